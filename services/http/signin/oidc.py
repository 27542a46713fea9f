"""Signing in with an OpenID provider: the redirect to the provider, and the way back."""

import hmac
import logging
import secrets
import time
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from services.http.failures import Failure, unavailable
from services.http.signin.attempts import Attempts
from services.http.signin.cookies import Cookies
from services.http.signin.issuer import GrantRefused, Issuer, IssuerUnavailable
from services.http.signin.keys import SessionKeys
from services.http.signin.session import Session

_log = logging.getLogger(__name__)
_COOKIE: Final = "llm_oidc"
_LIFETIME: Final = 600
"""Maximum time of a sign-in at the provider, in seconds."""
_MAX_PARAMETER: Final = 4096


@dataclass(frozen=True)
class _Begun:
    """A sign-in that a browser has started."""

    state: str
    nonce: str
    verifier: str
    next_page: str


class Oidc:
    """Starts sign-ins and completes them."""

    def __init__(self, issuer: Issuer, keys: SessionKeys, cookies: Cookies, attempts: Attempts) -> None:
        self._issuer = issuer
        self._keys = keys
        self._cookies = cookies
        self._attempts = attempts

    @property
    def name(self) -> str:
        """The name of the provider, to be shown."""
        return self._issuer.name

    async def begin(self, request: Request, next_page: str) -> Response:
        """Send the browser to the provider.

        Raises Failure: 429 after too many failed sign-ins, or while too many run, 503 while the provider is away.
        """
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        begun = _Begun(state, nonce, verifier, next_page)
        # A provider that is away does not use up the attempts with a key.
        async with self._attempts.attempt(request):
            try:
                url = await self._issuer.authorization_url(begun.state, begun.nonce, begun.verifier)
            except IssuerUnavailable as error:
                raise self._away(error) from None
        response = RedirectResponse(url, HTTPStatus.SEE_OTHER)
        self._cookies.write(request, response, _COOKIE, self._keys.seal(_COOKIE, asdict(begun)), _LIFETIME)
        return response

    async def complete(self, request: Request) -> tuple[Session, str]:
        """Return the session of a caller who comes back from the provider, and the page to continue at.

        Raises Failure: 400 for a sign-in that did not begin in this browser, 401 for one that the provider refuses, 429
        after too many of them, 503 while the provider is away.
        """
        query, begun = request.query_params, self._begun(request)
        if begun is None or not hmac.compare_digest(query.get("state", "").encode(), begun.state.encode()):
            raise Failure(HTTPStatus.BAD_REQUEST, "this sign-in is out of date; start again", "SIGN_IN_OUT_OF_DATE")
        # RFC 9207: a code of another provider must not be sent to this one.
        if query.get("iss", self._issuer.issuer) != self._issuer.issuer:
            raise self._refused("the answer is of another provider")
        code = query.get("code", "")
        if "error" in query or not 0 < len(code) <= _MAX_PARAMETER:
            raise self._refused(f"the provider answers {query.get('error', '')[:100]!r}")
        async with self._attempts.attempt(request) as attempt:
            try:
                tokens = await self._issuer.exchange(code, begun.verifier, begun.nonce)
            except GrantRefused as error:
                attempt.failed = True
                raise self._refused(str(error)) from None
            except IssuerUnavailable as error:
                raise self._away(error) from None
        session = Session(
            credential=tokens.credential,
            user=tokens.user,
            subject=tokens.subject,
            refresh_token=tokens.refresh_token,
            renew_at=tokens.renew_at,
        )
        return session, begun.next_page

    def end(self, request: Request, response: Response) -> None:
        """Delete the cookie of a started sign-in."""
        self._cookies.delete(request, response, _COOKIE)

    def _begun(self, request: Request) -> _Begun | None:
        text = self._cookies.read(request, _COOKIE)
        sealed = self._keys.unseal(_COOKIE, text) if text else None
        if sealed is None or time.time() >= sealed.at + _LIFETIME:
            return None
        try:
            return _Begun(**sealed.value)
        except TypeError:
            # A front of another version has written it.
            return None

    def _away(self, error: IssuerUnavailable) -> Failure:
        _log.warning("the OpenID provider cannot be used: %s", error)
        return unavailable(f"{self.name} does not answer, so that nobody can sign in there; try again", "ISSUER_AWAY")

    def _refused(self, why: str) -> Failure:
        _log.warning("a sign-in by the OpenID provider has failed: %s", why)
        return Failure(HTTPStatus.UNAUTHORIZED, f"{self.name} has not signed you in; start again", "SIGN_IN_REFUSED")
