"""The host of an address to listen on. An IPv6 address may stand in brackets, as in a URL, or without them."""

from ipaddress import ip_address


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
