"""Which hosts a webhook's URL may name: one that cannot exist is refused at once, and not looked up for days."""

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final

_MAX_NAME: Final = 253
_LABEL: Final = re.compile(r"[A-Za-z0-9_-]{1,63}")
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def is_host(host: str) -> bool:
    """Return whether the host of a URL, in ASCII and without brackets, is an address or may be a name of DNS.

    A host whose last label is a number can only be an IPv4 address (WHATWG URL, 3.5), and of its forms only four
    decimal numbers count: resolvers do not agree on the others.
    """
    if ":" in host:
        # A zone is known to one machine alone.
        return "%" not in host and _parses(IPv6Address, host)
    name = host.removesuffix(".")
    labels = name.split(".")
    if len(name) > _MAX_NAME or not all(map(_LABEL.fullmatch, labels)):
        return False
    return _NUMBER.fullmatch(labels[-1]) is None or _parses(IPv4Address, host)


def _parses(kind: type[IPv4Address | IPv6Address], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
