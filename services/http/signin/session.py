"""The session of a browser, in two cookies.

One holds the credential, so it is encrypted. Any answer may write it again: with a renewed credential, or because the
session is in use. The other holds the session's secret. Only signing in and out change it, and a session counts only
with its own secret. So the answer to a request that began before the person signed out brings no session back.
"""

import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from services.http.signin.cookies import MAX_VALUE, Cookies
from services.http.signin.keys import SessionKeys
from services.http.signin.settings import SignInSettings

_KIND: Final = "session"
_COOKIE: Final = "llm_session"
_SECRET_COOKIE: Final = "llm_csrf"  # noqa: S105  # a name
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_USES: Final = 10
"""Maximum number of times within the idle time that the use of a session is noted."""


@dataclass(frozen=True)
class Session:
    """The session of a browser. Without a credential it is anonymous."""

    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    """The secret in the forms of the session's pages. It changes with signing in and out."""
    began: float = field(default_factory=time.time)
    """When the person signed in, in seconds since 1970."""
    used_at: float = field(default_factory=time.time)
    """When the person last opened a page or sent a form, approximately, in seconds since 1970."""
    credential: str = field(default="", repr=False)
    """A credential of the gateway."""
    user: str = ""
    """The name of the credential's owner, for display."""
    subject: str = ""
    """The owner's subject at the OpenID provider. Empty: the person has signed in with a key or a token."""
    refresh_token: str = field(default="", repr=False)
    """The token by which the OpenID provider renews the credential. Empty: it cannot be renewed."""
    renew_at: float = 0
    """When to renew the credential, in seconds since 1970."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of gRPC that holds the credential; empty without one."""
        return {"authorization": f"Bearer {self.credential}"} if self.credential else {}


def is_navigation(request: Request) -> bool:
    """Return whether the browser shows the answer as a page. False: a module of an open page reads it.

    A browser sends Sec-Fetch-Mode by TLS and on loopback only. The modules send the other headers themselves.
    """
    headers = request.headers
    by_module = "x-requested-with" in headers or headers.get("accept", "").startswith("text/event-stream")
    return not by_module and headers.get("sec-fetch-mode", "navigate") == "navigate"


@dataclass(frozen=True)
class Opened:
    """The session of a request."""

    session: Session
    stored: bool
    """Whether the browser has it, as it is."""


class Sessions:
    """Reads and writes sessions."""

    def __init__(self, settings: SignInSettings, keys: SessionKeys, cookies: Cookies) -> None:
        self._lifetime = settings.session_lifetime.total_seconds()
        self._idle = settings.session_idle.total_seconds()
        self._keys = keys
        self._cookies = cookies

    def open(self, request: Request) -> Opened:
        """Return the session of a request, an anonymous one if it has no valid one."""
        secret = self._cookies.read(request, _SECRET_COOKIE)
        if not _SECRET.fullmatch(secret):
            return Opened(Session(), stored=False)
        text = self._cookies.read(request, _COOKIE)
        session = self._unsealed(text) if text else None
        if session is None or not hmac.compare_digest(session.secret, secret):
            return Opened(Session(secret), stored=not text)
        now = time.time()
        if now >= min(session.began + self._lifetime, session.used_at + self._idle):
            return Opened(Session(secret), stored=False)
        if now >= session.used_at + self._idle / _USES and is_navigation(request):
            return Opened(replace(session, used_at=now), stored=False)
        return Opened(session, stored=True)

    def store(self, request: Request, response: Response, session: Session) -> None:
        """Set the session's cookies. Raises TooLarge."""
        if self._cookies.read(request, _SECRET_COOKIE) != session.secret:
            age = self._lifetime if session.credential else None
            self._cookies.write(request, response, _SECRET_COOKIE, session.secret, age)
        if session.credential:
            end = min(session.began + self._lifetime, session.used_at + self._idle)
            self._cookies.write(request, response, _COOKIE, self._sealed(session), end - time.time())
        else:
            self._cookies.delete(request, response, _COOKIE)

    def fits(self, session: Session) -> bool:
        """Return whether a browser can keep a session."""
        return len(self._sealed(session)) <= MAX_VALUE

    def _sealed(self, session: Session) -> str:
        return self._keys.seal(_KIND, asdict(session))

    def _unsealed(self, text: str) -> Session | None:
        sealed = self._keys.unseal(_KIND, text)
        try:
            return Session(**sealed.value) if sealed is not None else None
        except TypeError:
            # A front of another version has written it.
            return None
