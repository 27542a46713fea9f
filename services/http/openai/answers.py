"""Answers in JSON; those to refused requests in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, Response

from durable_llm.errors import Violation
from services.http.failures import Failure

KINDS: Final = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
"""The `type` of an error by its status. Any other is an `invalid_request_error` below 500, else a `server_error`."""

NEVER_AGAIN: Final = {"x-should-retry": "false"}
"""Stops OpenAI's clients, which repeat every 408, 409, 429 and 5xx."""
_PASSING: Final = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
"""The statuses after which the same request may succeed."""


def unsupported(param: str, why: str = "") -> Failure:
    """Return the refusal of a parameter, or of its value, that this API does not support.

    `param` is the parameter as OpenAI's clients write it: `text.format.schema`, `messages[2].role`.
    """
    return _refusal(param, f"is not supported{f': {why}' if why else ''}", "unsupported_parameter")


def invalid(param: str, rule: str) -> Failure:
    """Return the refusal of a parameter whose value breaks a rule, such as `must be a string`."""
    return _refusal(param, rule, "invalid_value")


def _refusal(param: str, rule: str, reason: str) -> Failure:
    return Failure(HTTPStatus.BAD_REQUEST, f"{param!r} {rule}", reason, [Violation(param, rule)])


def error_object(message: str, status: HTTPStatus, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error object as an answer or a chunk of a stream holds it."""
    kind = KINDS.get(status, "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refuse(failure: Failure) -> Response:
    """Return the answer to a request that has failed. It names the first bad parameter; its message names all."""
    param = (failure.violations[0].field or None) if failure.violations else None
    code = failure.reason.lower() or None
    headers = dict(failure.headers)
    if failure.status not in _PASSING:
        headers.update(NEVER_AGAIN)
    return JSONResponse(error_object(failure.message, failure.status, code, param), failure.status, headers)


def answered(body: dict[str, Any], after: Callable[[], Awaitable[None]] | None = None) -> Response:
    """Return the answer to a request that was done. `after` is awaited once the answer was sent."""
    return JSONResponse(body, headers={"Cache-Control": "no-store"}, background=_task(after))


def failed(status: HTTPStatus, error: dict[str, Any], after: Callable[[], Awaitable[None]] | None = None) -> Response:
    """Return the answer to a request whose job has failed. `after` is awaited once the answer was sent."""
    return JSONResponse(error, status, NEVER_AGAIN, background=_task(after))


def _task(after: Callable[[], Awaitable[None]] | None) -> BackgroundTask | None:
    return None if after is None else BackgroundTask(after)
