"""The hosts that a webhook's URL may name. One that cannot exist is refused immediately, not retried for days."""

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import idna

_MAX_NAME: Final = 253
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
"""A label of a DNS name: RFC 1123, 2.1, and `_`, which is in use."""
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def is_host(host: str) -> bool:
    """Return whether the host of a URL, without brackets, is an IP address or may be a DNS name.

    A host whose last label is a number can only be an IPv4 address (WHATWG URL, 3.5). Only four decimal numbers in
    ASCII are accepted, because resolvers disagree on its other forms.
    """
    if ":" in host:
        # A zone is valid on one machine only.
        return "%" not in host and _parses(IPv6Address, host)
    name = _to_ascii(host).removesuffix(".")
    labels = name.split(".")
    if len(name) > _MAX_NAME or not all(map(_LABEL.fullmatch, labels)):
        return False
    return _NUMBER.fullmatch(labels[-1]) is None or _parses(IPv4Address, host)


def _to_ascii(host: str) -> str:
    """Return the name that the notifier looks up for the host, encoded as yarl does it. Empty if there is none."""
    if host.isascii():
        return host
    if len(host) > _MAX_NAME:
        return ""
    try:
        return idna.encode(host, uts46=True).decode()
    except UnicodeError:
        # The name is invalid in IDNA 2008. Some names of IDNA 2003, such as emoji, are in use.
        try:
            return host.encode("idna").decode()
        except UnicodeError:
            return ""


def _parses(kind: type[IPv4Address | IPv6Address], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
