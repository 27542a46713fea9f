"""Who makes an HTTP request: the answers to those whose credential does not count."""

from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from runtime.auth import Code, Refusal, bearer_token, challenge, credential_invalid, credential_missing, scope_missing
from runtime.auth_keys import ApiKeys

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STATUS: Final = {
    Code.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    Code.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""The HTTP status of each refusal."""


def challenge_headers(refusal: Refusal) -> dict[str, str]:
    """Return the headers of the answer to a refused request, next to those of every answer."""
    needed = challenge(refusal)
    return {"WWW-Authenticate": needed} if needed is not None else {}


def with_api_keys(application: "WSGIApplication", keys: ApiKeys, scope: str) -> "WSGIApplication":
    """Return the application for callers who have an API key with the scope.

    The file of the keys is looked at with each request, in the thread that serves it, so that neither needs the event
    loop of the process.
    """

    def guarded(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        try:
            _admit(environ.get("HTTP_AUTHORIZATION"), keys, scope)
        except Refusal as refusal:
            status, body = STATUS[refusal.code], f"{refusal}\n".encode()
            headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))}
            start_response(f"{status} {status.phrase}", [*(headers | challenge_headers(refusal)).items()])
            return [body]
        return application(environ, start_response)

    return guarded


def _admit(authorization: str | None, keys: ApiKeys, scope: str) -> None:
    """Raise Refusal for a caller who may not."""
    token = bearer_token([authorization] if authorization is not None else [])
    if token is None:
        raise credential_missing(f"the request has no credential; send {keys.hint}")
    keys.reload()
    caller = keys.find(token)
    if caller is None:
        raise credential_invalid(f"no credential of this kind counts here; send {keys.hint}")
    if not caller.may(scope):
        raise scope_missing(scope)
