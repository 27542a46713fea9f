"""Answers in JSON; those to refused requests in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from durable_llm.errors import Violation
from openai_api.errors import InvalidBody, error_object
from services.http.failures import Failure
from services.http.resources import Handler

NEVER_AGAIN: Final = {"x-should-retry": "false"}
"""Header that stops OpenAI's clients from repeating a request. They repeat every 408, 409, 429 and 5xx."""
_PASSING: Final = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
"""The statuses after which the same request may succeed."""


def failing(handler: Handler) -> Handler:
    """Return the handler of a request that raises Failure, 400, where the given one raises InvalidBody."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except InvalidBody as error:
            violations = [Violation(*violation) for violation in error.violations]
            raise Failure(HTTPStatus.BAD_REQUEST, error.message, error.reason, violations) from error

    return handle


def refuse(failure: Failure) -> Response:
    """Return the answer to a request that has failed. It names the first bad parameter; its message names all."""
    param = (failure.violations[0].field or None) if failure.violations else None
    code = failure.reason.lower() or None
    headers = dict(failure.headers)
    never_fits = failure.status is HTTPStatus.TOO_MANY_REQUESTS and "Retry-After" not in headers
    if failure.status not in _PASSING or never_fits:
        headers.update(NEVER_AGAIN)
    return JSONResponse(error_object(failure.message, failure.status, code, param), failure.status, headers)


def answered(body: dict[str, Any], after: Callable[[], Awaitable[None]] | None = None) -> Response:
    """Return the answer to a request that has succeeded. `after` is awaited once the answer was sent."""
    return JSONResponse(body, headers={"Cache-Control": "no-store"}, background=_task(after))


def failed(status: HTTPStatus, error: dict[str, Any], after: Callable[[], Awaitable[None]] | None = None) -> Response:
    """Return the answer to a request whose job has failed. `after` is awaited once the answer was sent."""
    return JSONResponse(error, status, NEVER_AGAIN, background=_task(after))


def _task(after: Callable[[], Awaitable[None]] | None) -> BackgroundTask | None:
    return None if after is None else BackgroundTask(after)
