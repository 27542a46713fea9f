"""Closing a connection that a gRPC server has accepted.

grpc.aio has no call for it, and none that ends a single call whose client reads nothing: the status of an abort waits
behind the message that the client does not take, and a handler that is cancelled leaves the message with gRPC. A socket
that is shut down, though, is to gRPC a client that has left, and frees all that its calls hold.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Collection, Iterator
from typing import Final
from urllib.parse import unquote

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


def shut_down(peers: Collection[str], port: int) -> int:
    """Shut down the connections of these peers to a port of this process; return how many there were.

    A peer is what `ServicerContext.peer()` returns: "ipv4:192.0.2.1:50000". Looks at every open file: call it in a
    thread.
    """
    addresses = {_address(peer) for peer in peers}
    found = 0
    for connection in _sockets():
        # One that is not connected has no peer.
        with contextlib.suppress(OSError):
            # A connection that this process has opened may lead to the same address.
            accepted = connection.family in _FAMILIES and connection.getsockname()[1] == port
            if accepted and _normal(*connection.getpeername()[:2]) in addresses:
                connection.shutdown(socket.SHUT_RDWR)
                found += 1
    return found


def _sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of each socket of the process, which nobody else can close meanwhile, and close it."""
    for name in os.listdir("/dev/fd"):
        try:
            duplicate = os.dup(int(name))
        except OSError:
            continue
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:
            # No socket.
            os.close(duplicate)
            continue
        with found:
            yield found


def _address(peer: str) -> tuple[str, int]:
    _, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    return _normal(host.strip("[]"), int(port))


def _normal(host: str, port: int) -> tuple[str, int]:
    """Return an address as one of IPv4, where it is written as one of IPv6."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), port
