"""The destinations that webhooks may have, by the form of the URL and by the address at the moment of the connection.

A client chooses the URL, so it may aim at what only this machine can reach: its own services, its neighbours, the
metadata of its cloud. A name proves nothing, because its owner can point it at any address and change that at any time.
So the check is made where the socket is opened, on the very address that the socket then connects to.
"""

import socket
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final

from yarl import URL

from jobs.errors import DeliveryRefused
from jobs.hosts import is_host

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_PUBLIC_V6: Final = ip_network("2000::/3")
"""All addresses that IANA allocates for unicast. This excludes the forms of IPv6 outside it that embed an IPv4
address."""
_NAT64: Final = ip_network("64:ff9b::/96")
"""Addresses that lead to the IPv4 address in their last 32 bits (RFC 6052)."""
_OTHER: Final[dict[Network, str]] = {
    ip_network("168.63.129.16/32"): "a metadata address",  # Azure's, public by its form
    # The lists of some supported Python versions lack these.
    ip_network("192.0.0.0/24"): "a reserved address",
    ip_network("3fff::/20"): "a reserved address",
    ip_network("192.88.99.0/24"): "an address of 6to4",
    ip_network("2002::/16"): "an address of 6to4",
    ip_network("2001::/32"): "an address of Teredo",
    ip_network("169.254.0.0/16"): "a link-local or metadata address",
}


def why_not_public(address: Address) -> str:
    """Return the kind of an address that webhooks may not connect to; empty for a public address."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return "an IPv4 address inside IPv6"
        if address in _NAT64:
            return why_not_public(IPv4Address(int(address) & 0xFFFFFFFF))
    for network, kind in _OTHER.items():
        if address in network:
            return kind
    for holds, kind in (
        (address.is_unspecified, "an unspecified address"),
        (address.is_loopback, "a loopback address"),
        (address.is_link_local, "a link-local address"),
        (address.is_multicast, "a multicast address"),
        (not address.is_global, "a private or reserved address"),
        (isinstance(address, IPv6Address) and address not in _PUBLIC_V6, "a reserved address"),
    ):
        if holds:
            return kind
    return ""


class EgressPolicy:
    """Decides which destinations webhooks may have."""

    def __init__(self, schemes: Collection[str], ports: Collection[int], networks: Collection[Network]) -> None:
        """`networks` are allowed although they are not public; no `ports` allows any."""
        self._schemes = schemes
        self._ports = ports
        self._networks = networks

    def parse(self, text: str) -> URL:
        """Return the URL. Raises DeliveryRefused if it is invalid or has a form that is not allowed."""
        try:
            url = URL(text)
            host, port = url.raw_host, url.port
        except ValueError as error:
            raise DeliveryRefused("the webhook's URL is not valid") from error
        if url.scheme not in self._schemes:
            raise DeliveryRefused(f"a webhook's URL must begin with {' or '.join(f'{s}://' for s in self._schemes)}")
        if not host:
            raise DeliveryRefused("the webhook's URL names no host")
        if url.user is not None or url.password is not None:
            raise DeliveryRefused("a webhook's URL must not hold a user or password")
        if self._ports and port not in self._ports:
            raise DeliveryRefused(f"a webhook may not go to port {port}")
        if (literal := _literal(host)) is not None:
            self._check(literal)
        if port == 0 or not is_host(host):
            raise DeliveryRefused("the webhook's URL names no valid host")
        return url

    def socket(self, info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        """Return a socket that is about to connect to the address from getaddrinfo. Raises DeliveryRefused."""
        family, kind, protocol, _, (host, *_) = info
        self._check(ip_address(host))
        return socket.socket(family, kind, protocol)

    def _check(self, address: Address) -> None:
        if any(address in network for network in self._networks):
            return
        if reason := why_not_public(address):
            raise DeliveryRefused(f"the webhook leads to {reason}; only public addresses are allowed")


def unrestricted() -> EgressPolicy:
    """Return a policy for the URLs that an operator has chosen: any address and port, by HTTP and HTTPS."""
    return EgressPolicy(("https", "http"), (), (ip_network("0.0.0.0/0"), ip_network("::/0")))


def _literal(host: str) -> Address | None:
    """Return the address that a host is, in any form that the system's resolver accepts; None for a name."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        # RFC 6761, 6.3.
        return IPv4Address("127.0.0.1")
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        # 0x7f.1, 0177.0.0.1, 2130706433 and the like.
        return IPv4Address(socket.inet_aton(name))
    except (OSError, ValueError):
        return None
