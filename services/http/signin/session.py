"""The session of a browser, in a cookie. It holds the credential, so it is encrypted."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from services.http.signin.cookies import Cookies
from services.http.signin.keys import SessionKeys
from services.http.signin.settings import SignInSettings

_KIND: Final = "session"
_COOKIE: Final = "llm_session"
_USES: Final = 10
"""How often the use of a session is noted within the idle time, at most."""


@dataclass(frozen=True)
class Session:
    """What the front knows of a browser. Without a credential it is anonymous."""

    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    """What the forms of the session's pages carry."""
    began: float = field(default_factory=time.time)
    """When the person signed in, in seconds since 1970."""
    used_at: float = field(default_factory=time.time)
    """When the person last opened a page or sent a form, about, in seconds since 1970."""
    credential: str = field(default="", repr=False)
    """A credential of the gateway."""
    user: str = ""
    """Whose it is, to be shown."""
    subject: str = ""
    """Who it is to the OpenID provider. Empty: the person has signed in with a key or a token."""
    refresh_token: str = field(default="", repr=False)
    """With which the OpenID provider renews the credential. Empty: it cannot be renewed."""
    renew_at: float = 0
    """When to renew the credential, in seconds since 1970."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of gRPC that holds the credential; empty without one."""
        return {"authorization": f"Bearer {self.credential}"} if self.credential else {}


def is_navigation(request: Request) -> bool:
    """Return whether the answer is shown as a page, and not read by a module of an open one."""
    return request.headers.get("sec-fetch-mode", "navigate") == "navigate"


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
        """Return the session of a request; a new, anonymous one if it has none that counts."""
        text = self._cookies.read(request, _COOKIE)
        sealed = self._keys.unseal(_KIND, text) if text else None
        if sealed is None:
            return Opened(Session(), stored=False)
        try:
            session = Session(**sealed.value)
        except TypeError:
            # A front of another version has written it.
            return Opened(Session(), stored=False)
        # The idle time does not end a session without a credential, which protects nothing but the forms of its pages.
        if session.credential:
            now = time.time()
            if now >= min(session.began + self._lifetime, session.used_at + self._idle):
                return Opened(Session(), stored=False)
            if now >= session.used_at + self._idle / _USES and is_navigation(request):
                return Opened(replace(session, used_at=now), stored=False)
        return Opened(session, stored=True)

    def store(self, request: Request, response: Response, session: Session) -> None:
        """Let the browser keep a session. Raises TooLarge."""
        end = min(session.began + self._lifetime, session.used_at + self._idle)
        left = end - time.time() if session.credential else None
        self._cookies.write(request, response, _COOKIE, self._keys.seal(_KIND, asdict(session)), left)

    def end(self, request: Request, response: Response) -> None:
        """Let the browser forget its session."""
        self._cookies.delete(request, response, _COOKIE)
