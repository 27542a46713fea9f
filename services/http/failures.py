"""Errors of the HTTP API: one exception, and the one table from gRPC's codes to HTTP's.

The packages of the API differ in the bodies of their errors. Status, headers and messages are the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from http import HTTPStatus
from typing import Final

import grpc

from durable_llm import ApiError
from durable_llm.errors import Violation

STATUS: Final = {
    grpc.StatusCode.CANCELLED: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.UNKNOWN: HTTPStatus.INTERNAL_SERVER_ERROR,
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: HTTPStatus.CONFLICT,
    grpc.StatusCode.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    # Not 412, which is for conditions that the request states.
    grpc.StatusCode.FAILED_PRECONDITION: HTTPStatus.CONFLICT,
    grpc.StatusCode.ABORTED: HTTPStatus.CONFLICT,
    grpc.StatusCode.OUT_OF_RANGE: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    grpc.StatusCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The HTTP status of each code with which a call of the gateway fails."""

CALL_AGAIN: Final = "; call again"
"""Ends the message of a failure that may pass, unless the message has another remedy."""
_WITHOUT_REASON: Final = {
    grpc.StatusCode.UNAVAILABLE: f"the gateway does not answer{CALL_AGAIN}",
    grpc.StatusCode.DEADLINE_EXCEEDED: f"the gateway has not answered in time{CALL_AGAIN}",
}
"""The messages of failures that are not the gateway's own."""
_RETRY: Final = timedelta(seconds=1)


class Failure(Exception):
    """Ends a request with an error."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        reason: str = "",
        violations: Sequence[Violation] = (),
        *,
        retry_after: timedelta | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        """What is wrong, for people."""
        self.reason = reason
        """What is wrong, for programs: google.rpc.ErrorInfo.reason, or one of the front's own. May be empty."""
        self.violations = tuple(violations)
        """Every bad field."""
        self.headers = dict(headers or {})
        """Headers of the answer that every body needs: Allow, Retry-After, WWW-Authenticate."""
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after.total_seconds())))


def of_call(error: ApiError) -> Failure:
    """Return the failure that a failed call of the gateway becomes."""
    status = STATUS[error.code]
    headers = {"WWW-Authenticate": _challenge(error)} if status is HTTPStatus.UNAUTHORIZED else {}
    message = str(error)
    if not error.reason:
        # The message is that of gRPC, with internal addresses.
        message = _WITHOUT_REASON.get(error.code, message)
    wait = error.retry_delay
    if wait is None and status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT):
        wait = _RETRY
    return Failure(status, message, error.reason, error.violations, retry_after=wait, headers=headers)


def bad_request(*violations: Violation, message: str = "") -> Failure:
    """Return 400 with every bad field."""
    return Failure(HTTPStatus.BAD_REQUEST, message or _words(violations), "INVALID_REQUEST", violations)


def with_fields(failure: Failure, names: Callable[[str], str]) -> Failure:
    """Return a failure whose bad fields have the names that `names` gives them. The message names them, too."""
    if not failure.violations:
        return failure
    violations = [Violation(names(field), description) for field, description in failure.violations]
    return Failure(failure.status, _words(violations), failure.reason, violations, headers=failure.headers)


def unavailable(message: str, reason: str) -> Failure:
    """Return 503: this front cannot serve the request now."""
    return Failure(HTTPStatus.SERVICE_UNAVAILABLE, message, reason, retry_after=_RETRY)


def _words(violations: Sequence[Violation]) -> str:
    return "; ".join(f"{field} {description}".strip() for field, description in violations)


def _challenge(error: ApiError) -> str:
    """Return the value of WWW-Authenticate, as the gateway's own by RFC 6750."""
    return "Bearer" if error.reason == "CREDENTIAL_MISSING" else 'Bearer error="invalid_token"'
