"""Closing a connection that a gRPC server has accepted.

grpc.aio has no function for it, and none that ends a single call whose client reads nothing. The status of an abort
waits behind the message that the client does not read, and a cancelled handler leaves the message with gRPC. When a
socket is shut down, gRPC treats the client as disconnected and frees everything that its calls hold.
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
    """Shut down the connections of these peers to a port of this process; return how many were found.

    A peer is what `ServicerContext.peer()` returns: "ipv4:192.0.2.1:50000". The function reads the list of all open
    files: call it in a thread.
    """
    addresses = {_address(peer) for peer in peers}
    found = 0
    for connection in _sockets():
        # A socket that is not connected has no peer.
        with contextlib.suppress(OSError):
            # An outgoing connection of this process may have the same remote address.
            accepted = connection.family in _FAMILIES and connection.getsockname()[1] == port
            if accepted and _normal(*connection.getpeername()[:2]) in addresses:
                connection.shutdown(socket.SHUT_RDWR)
                found += 1
    return found


def _sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of each socket of the process, and close it afterwards. Nothing else can close a duplicate."""
    for name in os.listdir("/dev/fd"):
        try:
            duplicate = os.dup(int(name))
        except OSError:
            continue
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:
            # The descriptor is not a socket.
            os.close(duplicate)
            continue
        with found:
            yield found


def _address(peer: str) -> tuple[str, int]:
    _, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    return _normal(host.strip("[]"), int(port))


def _normal(host: str, port: int) -> tuple[str, int]:
    """Return an address and port, with an IPv4-mapped IPv6 address as IPv4."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), port
