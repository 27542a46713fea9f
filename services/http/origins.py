"""Which pages are the front's own."""


def is_own(origin: str, host: str) -> bool:
    """Return whether a page of an origin (the header Origin) was served by the host that a request is for (Host).

    The scheme is ignored, because a proxy that ends TLS changes it. No page of another server has this host.
    """
    return origin.partition("://")[2].lower() == host.lower()
