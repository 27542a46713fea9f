"""The stack's TCP ports, all on the loopback interface."""

import random
import socket
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from deploy.local.errors import PortTaken
from deploy.local.settings import StackSettings

HOST: Final = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """One port for each listener. A field `x` is set by STACK_X_PORT."""

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
    demo_webhook: int


def choose_ports(settings: StackSettings) -> Ports:
    """Return the ports of the settings, with a free one for each 0."""
    chosen: dict[str, int] = {}
    for field in fields(Ports):
        chosen[field.name] = getattr(settings, f"{field.name}_port") or free_port(avoid=chosen.values())
    return Ports(**chosen)


def require_free(port: int, name: str) -> None:
    """Raise PortTaken when something listens on the port of the field `name`."""
    if not _is_free(port):
        raise PortTaken(port, f"STACK_{name.upper()}_PORT")


def free_port(avoid: Collection[int] = ()) -> int:
    """Return a port that nobody listens on and that no outgoing connection will be given.

    A client that retries while its server is down must not be given the server's port as its own: it would connect to
    itself, and the server could not come back. So the port lies below the range that the system hands out.
    """
    candidates = range(10_000, _first_ephemeral_port())
    while True:
        port = random.choice(candidates)
        if port not in avoid and _is_free(port):
            return port


def _first_ephemeral_port() -> int:
    linux = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(linux.read_text().split()[0]) if linux.exists() else 32_768
    # Some systems hand out everything from 1024 on; then there is no better place.
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
