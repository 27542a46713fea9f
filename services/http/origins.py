"""Which pages are the front's own."""


def is_own(origin: str, host: str) -> bool:
    """Return whether a page of an origin (the header Origin) was served by the host that a request is for (Host).

    A proxy that ends TLS changes the scheme, so that it does not count. No page of another server has this host.
    """
    return origin.partition("://")[2].lower() == host.lower()
