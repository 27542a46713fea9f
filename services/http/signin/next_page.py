"""The page to which signing in leads back: one of the console, never of another server."""

import re
from typing import Final
from urllib.parse import urlencode

from starlette.requests import Request

HOME: Final = "/console/"
SIGN_IN: Final = "/console/signin"
_MAX: Final = 2000
_PATH: Final = re.compile(r"/console/[!#-\[\]-~]*")
"""ASCII without spaces, control characters, `"` and `\\`, which browsers take for `/`."""


def checked(path: str) -> str:
    """Return a path of the console; its home page for anything else."""
    # A browser resolves `..` before it asks.
    climbs = ".." in path.partition("?")[0].lower().replace("%2e", ".").split("/")
    good = len(path) <= _MAX and _PATH.fullmatch(path) and not path.startswith(SIGN_IN) and not climbs
    return path if good else HOME


def place_of(request: Request) -> str:
    """Return the path of the page that a request is for. A form cannot be sent again by leading back to it."""
    if request.method != "GET":
        return HOME
    query = request.url.query
    return checked(f"{request.scope['path']}{'?' if query else ''}{query}")


def sign_in_path(next_page: str) -> str:
    """Return the path of the sign-in page that leads back to a page."""
    return SIGN_IN if next_page == HOME else f"{SIGN_IN}?{urlencode({'next': next_page})}"
