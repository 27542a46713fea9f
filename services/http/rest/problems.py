"""Errors of the REST API: RFC 9457's application/problem+json."""

from typing import Any

from starlette.responses import JSONResponse, Response

from services.http.failures import Failure


def problem(failure: Failure) -> dict[str, Any]:
    """Return the body of an error. Empty `reason` and `errors` are left out."""
    body: dict[str, Any] = {
        "title": failure.status.phrase,
        "status": int(failure.status),
        "detail": failure.message,
    }
    if failure.reason:
        body["reason"] = failure.reason
    if failure.violations:
        body["errors"] = [{"field": field, "message": description} for field, description in failure.violations]
    return body


def answer(failure: Failure) -> Response:
    """Return the answer to a request that has failed."""
    return JSONResponse(problem(failure), failure.status, failure.headers, "application/problem+json")
