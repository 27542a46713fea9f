"""The host of an address to listen on. An IPv6 address may stand in brackets, as in a URL, or without them."""


def bracketed(host: str) -> str:
    """Return the host in the form that stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def unbracketed(host: str) -> str:
    """Return the host in the form that socket functions take: an IPv6 address without brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
