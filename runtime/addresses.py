"""Addresses in settings: the host to listen on, and the URLs of the servers of NATS.

The IPv6 address of a host may stand in brackets, as in a URL, or without them.
"""

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from pydantic import SecretStr


def bracketed(host: str) -> str:
    """Return the host in the form that stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def unbracketed(host: str) -> str:
    """Return the host in the form that socket functions take: an IPv6 address without brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address to listen on. Of names only `localhost` is loopback."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_confidential(url: str) -> bool:
    """Return whether requests to a URL and their answers are encrypted or stay on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))


def servers_of(url: SecretStr) -> list[str]:
    """Return the URL of each server in a setting that may hold several, with commas between them.

    A comma may be a part of a password.
    """
    return re.split(r",(?=\w+://)", url.get_secret_value())
