"""Chooses the TCP ports of the stack, all on the loopback interface."""

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import IO, Final

from deploy.local.errors import PortTaken
from deploy.local.settings import StackSettings

HOST: Final = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """One port for each listener. STACK_X_PORT sets the field `x`."""

    temporal: int
    temporal_ui: int
    temporal_metrics: int
    nats: int
    codec: int
    codec_metrics: int
    gateway: int
    gateway_metrics: int
    gpu_worker_metrics: int
    notifier_metrics: int
    trainer_metrics: int
    http: int
    http_metrics: int
    demo_webhook: int


def choose_ports(settings: StackSettings) -> Ports:
    """Return the ports of the settings, with a free port in place of each 0."""
    names = [field.name for field in fields(Ports)]
    return Ports(**{name: getattr(settings, f"{name}_port") or free_port() for name in names})


def require_free(port: int, name: str) -> None:
    """Raise PortTaken when something listens on the port of the field `name`."""
    if not _is_free(port):
        raise PortTaken(port, f"STACK_{name.upper()}_PORT")


def free_port() -> int:
    """Return a port without a listener, outside the ephemeral range, that was not returned before to a running process.

    A client that retries while its server is down must not get the server's port as its own: it would connect to
    itself, and the server could not restart. So the port lies below the range that the system assigns to outgoing
    connections.
    """
    return next(port for port in _candidates() if _claim(port) and _is_free(port))


@cache
def _candidates() -> Iterator[int]:
    """Return an iterator of all ports from a random one on. Every call returns the same iterator.

    Stacks of several processes that start concurrently choose their ports before they listen. If each port were random,
    two of a hundred would be the same every fifth time.
    """
    ports = range(10_000, _first_ephemeral_port())
    start = random.randrange(len(ports))
    return cycle([*ports[start:], *ports[:start]])


def _claim(port: int) -> bool:
    """Keep a port from other processes of the user until this one ends; return False if another has it."""
    try:
        # A lock of one byte, which the system releases.
        fcntl.lockf(_claims(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@cache
def _claims() -> IO[bytes]:
    # It stays open: a process loses its locks with the first descriptor of the file that it closes.
    return Path(tempfile.gettempdir(), f"durable-llm-ports-{os.getuid()}").open("ab")


def _first_ephemeral_port() -> int:
    linux = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(linux.read_text().split()[0]) if linux.exists() else 32_768
    # Some systems assign all ports from 1024 on. Then no range is better.
    return max(first, 20_000)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Connections of an earlier server that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
