"""Gives each request of the console its session, and asks to sign in once the gateway refuses its credential."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Final

import grpc
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from durable_llm import ApiError
from services.http.failures import Failure, of_call
from services.http.resources import Handler, Resource
from services.http.signin import next_page
from services.http.signin.cookies import MAX_VALUE, TooLarge
from services.http.signin.renewals import Renewals
from services.http.signin.session import Session, Sessions, is_navigation

_log = logging.getLogger(__name__)
_SESSION: Final = "llm_session"
"""The key of a scope with the session of a request."""
CREDENTIAL_BYTES: Final = 8000
"""Maximum size of the credential and the refresh token of a session together, in bytes."""
assert (CREDENTIAL_BYTES + 400) * 4 / 3 < MAX_VALUE  # noqa: S101  # base64, and what else is in a session


def session_of(request: Request) -> Session:
    """Return the session of a request to a resource of with_sessions()."""
    session: Session = request.scope[_SESSION]
    return session


def change_session(request: Request, session: Session) -> None:
    """Replace the browser's session with the answer to this request."""
    request.scope[_SESSION] = session


class SignedIn:
    """Opens and keeps the sessions of requests."""

    def __init__(self, sessions: Sessions, renewals: Renewals, answer: Callable[[Failure, Request], Response]) -> None:
        """`answer(failure, request)` makes the page of an error."""
        self._sessions = sessions
        self._renewals = renewals
        self._failed = answer

    def with_sessions(self, resource: Resource) -> Resource:
        """Return the resource with a session for each of its requests."""
        methods: Mapping[str, Handler] = {
            method: partial(self._answer, handler) for method, handler in resource.methods.items()
        }
        return replace(resource, methods=methods)

    async def _answer(self, handler: Handler, request: Request) -> Response:
        opened = self._sessions.open(request)
        change_session(request, await self._renewals.renewed(opened.session))
        try:
            response = await handler(request)
        except Failure as failure:
            response = self._failed(failure, request)
        except ApiError as error:
            if error.code is grpc.StatusCode.UNAUTHENTICATED and is_navigation(request):
                response = RedirectResponse(next_page.sign_in_path(next_page.place_of(request)), HTTPStatus.SEE_OTHER)
            else:
                response = self._failed(of_call(error), request)
        session = session_of(request)
        # A module of an open page may have sent its request before the page's own cookie came.
        new = not opened.stored and (session.credential or is_navigation(request))
        if new or session is not opened.session:
            try:
                self._sessions.store(request, response, session)
            except TooLarge:
                if session.secret == opened.session.secret:
                    # This request signed nobody in. The session that the browser has stays valid.
                    _log.warning("a session has become too large for its cookies and stays as it was")
                    return response
                words = f"the credential is too large: a session holds {CREDENTIAL_BYTES} bytes"
                raise Failure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, words, "CREDENTIAL_TOO_LARGE") from None
        if "set-cookie" in response.headers:
            # A shared cache would give the session to others.
            response.headers["Cache-Control"] = "no-store"
        return response
