"""The pages of signing in and out."""

from http import HTTPStatus
from typing import Final

import grpc
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from durable_llm import ApiError
from llm_pb import llm_pb2
from services.http.console.forms import read_form
from services.http.console.pages import Pages
from services.http.failures import Failure, of_call
from services.http.front import Front
from services.http.resources import Resource
from services.http.signin import next_page
from services.http.signin.attempts import Attempts
from services.http.signin.cookies import Cookies
from services.http.signin.issuer import CALLBACK, Issuer
from services.http.signin.keys import SessionKeys
from services.http.signin.oidc import Oidc
from services.http.signin.renewals import Renewals
from services.http.signin.session import Session, Sessions
from services.http.signin.signed_in import CREDENTIAL_BYTES, SignedIn, change_session, session_of

_KEY_PREFIX: Final = "llmk_"


class SignIn:
    """The handlers, and the sessions that they change."""

    def __init__(self, front: Front, pages: Pages) -> None:
        """Raises OSError, ValueError for a file of the settings that cannot be used."""
        settings = front.settings
        secure = settings.tls is not None or settings.public_url.startswith("https:")
        keys, cookies = SessionKeys(settings.session_key_file, front.readiness), Cookies(secure=secure)
        issuer = Issuer(settings, front.readiness) if settings.oidc_issuer else None
        self._front = front
        self._pages = pages
        self._attempts = Attempts()
        self._oidc = Oidc(issuer, keys, cookies, self._attempts) if issuer is not None else None
        front.background.append(keys.follow)
        sessions = Sessions(settings, keys, cookies)
        self._signed_in = SignedIn(sessions, Renewals(issuer, sessions.fits), pages.answer)

    def with_sessions(self, *resources: Resource) -> tuple[Resource, ...]:
        """Return the resources, and those of signing in, with a session for each of their requests."""
        own = [
            Resource(next_page.SIGN_IN, {"GET": self.show, "POST": self.sign_in}),
            Resource("/console/signout", {"POST": self.sign_out}),
        ]
        if self._oidc is not None:
            own += [
                Resource("/console/signin/oidc", {"GET": self.begin_oidc}),
                Resource(CALLBACK, {"GET": self.complete_oidc}),
            ]
        return tuple(self._signed_in.with_sessions(resource) for resource in (*own, *resources))

    async def show(self, request: Request) -> Response:
        """Show the form. Redirect callers who need not sign in. Raises ApiError while the gateway is away."""
        following, session = next_page.checked(request.query_params.get("next", "")), session_of(request)
        if await self._counts(session):
            return RedirectResponse(following, HTTPStatus.SEE_OTHER)
        if not session.credential:
            return self._form(request, following)
        change_session(request, Session())
        words = "Your session has ended: the gateway no longer takes its credential, which has expired or was revoked."
        return self._form(request, following, words, HTTPStatus.OK)

    async def sign_in(self, request: Request) -> Response:
        """Sign in with the key in the form."""
        form = await read_form(request, self._front.settings, "key", "next")
        following, key = next_page.checked(form.get("next", "")), form.get("key", "").strip()
        async with self._attempts.attempt(request) as attempt:
            if not (key and key.isascii() and key.isprintable() and len(key) <= CREDENTIAL_BYTES):
                words = f"Enter an API key or a token, of at most {CREDENTIAL_BYTES} characters."
                return self._form(request, following, words, HTTPStatus.BAD_REQUEST)
            session = Session(credential=key, user=_name_of(key))
            if not await self._counts(session):
                attempt.failed = True
                return self._form(request, following, "The gateway does not take this key. Has it expired?")
        change_session(request, session)
        return RedirectResponse(following, HTTPStatus.SEE_OTHER)

    async def sign_out(self, request: Request) -> Response:
        """Forget the credential."""
        await read_form(request, self._front.settings)
        change_session(request, Session())
        return RedirectResponse(next_page.SIGN_IN, HTTPStatus.SEE_OTHER)

    async def begin_oidc(self, request: Request) -> Response:
        """Send the browser to the OpenID provider.

        A caller who has signed in is not sent: a link of another site must not change the session.
        """
        assert self._oidc is not None  # noqa: S101  # otherwise there is no such path
        following, session = next_page.checked(request.query_params.get("next", "")), session_of(request)
        if session.credential and await self._counts(session):
            return RedirectResponse(following, HTTPStatus.SEE_OTHER)
        return await self._oidc.begin(request, following)

    async def complete_oidc(self, request: Request) -> Response:
        """Sign in a caller who comes back from the OpenID provider."""
        assert self._oidc is not None  # noqa: S101  # otherwise there is no such path
        try:
            session, following = await self._oidc.complete(request)
            if await self._counts(session):
                change_session(request, session)
                response: Response = RedirectResponse(following, HTTPStatus.SEE_OTHER)
            else:
                words = f"{self._oidc.name} has signed you in, but the gateway does not take its token."
                response = self._form(request, following, words)
        except (Failure, ApiError) as error:
            failure = error if isinstance(error, Failure) else of_call(error)
            response = self._form(request, next_page.HOME, failure.message, failure.status)
            response.headers.update(failure.headers)
        self._oidc.end(request, response)
        return response

    async def _counts(self, session: Session) -> bool:
        """Return whether the gateway accepts the session's credential. Raises ApiError when it cannot check it."""
        try:
            await self._front.gateway.in_name_of(session.metadata).call("GetQuota", llm_pb2.GetQuotaRequest())
        except ApiError as error:
            if error.code is grpc.StatusCode.UNAUTHENTICATED:
                return False
            # A caller without the scope of this call may have others.
            if error.code is not grpc.StatusCode.PERMISSION_DENIED:
                raise
        return True

    def _form(
        self, request: Request, following: str, problem: str = "", status: HTTPStatus = HTTPStatus.UNAUTHORIZED
    ) -> Response:
        page = self._pages.render(
            request,
            "sign_in.html",
            status if problem else HTTPStatus.OK,
            following=following,
            problem=problem,
            invalid=bool(problem) and status is not HTTPStatus.OK,
            provider=self._oidc.name if self._oidc is not None else "",
        )
        if page.status_code == HTTPStatus.UNAUTHORIZED:
            # A 401 needs one. Browsers know no dialog for it.
            page.headers["WWW-Authenticate"] = "Bearer"
        return page


def _name_of(key: str) -> str:
    """Return what may be shown of a credential: the id of an API key."""
    return key[: key.index("_", len(_KEY_PREFIX))] if key.startswith(_KEY_PREFIX) and key.count("_") > 1 else "token"
