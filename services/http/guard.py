"""Refuses requests of foreign web pages. A browser lets any page call any server, also one on loopback."""

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services.http import origins
from services.http.failures import Failure
from services.http.resources import Answer
from services.http.settings import HttpSettings

_ANY: Final = "*"
_HOST: Final = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]*)?")
"""A Host header: an IPv6 address in brackets, or a name or an IPv4 address; and maybe a port."""


class Guard:
    """Refuses requests for other hosts with 421, and requests of pages of other origins with 403.

    By DNS rebinding the host name of a foreign page leads to this server, so the browser sees one origin. Only the
    header Host shows that. Programs that are no browsers send no Origin.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings, answer: Callable[[str], Answer]) -> None:
        """`answer(path)` gives errors the form that they have under a path."""
        self._app = app
        self._hosts = {host.strip("[]").lower() for host in (*settings.allowed_hosts, settings.host)}
        self._origins = set(settings.cors_origins)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        try:
            self._check(Headers(scope=scope))
        except Failure as failure:
            await self._answer(scope["path"])(failure)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        found = _HOST.fullmatch(host)
        if found is None or not {(found["address"] or found["name"]).lower(), _ANY} & self._hosts:
            words = "this server has another name; HTTP_ALLOWED_HOSTS adds names"
            raise Failure(HTTPStatus.MISDIRECTED_REQUEST, words, "HOST_NOT_ALLOWED")
        origin = headers.get("origin")
        if origin is None or self._origins & {origin, _ANY}:
            return
        if not origins.is_own(origin, host):
            words = "pages of this origin may not call; HTTP_CORS_ORIGINS adds origins"
            raise Failure(HTTPStatus.FORBIDDEN, words, "ORIGIN_NOT_ALLOWED")
