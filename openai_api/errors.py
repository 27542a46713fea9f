"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, and the refusal of a body."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

from jobs.field_rules import Violation

KINDS: Final = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
"""The `type` of an error by its status. Any other is an `invalid_request_error` below 500, else a `server_error`."""


class InvalidBody(Exception):
    """The body of a request asks for what is not supported, or breaks a rule. Its status is 400."""

    def __init__(self, message: str, reason: str, violations: Sequence[Violation]) -> None:
        super().__init__(message)
        self.message = message
        """What is wrong, for people."""
        self.reason = reason
        """`unsupported_parameter` or `invalid_value`."""
        self.violations = tuple(violations)
        """The bad parameters, at least one, as OpenAI's clients write them: `messages[2].role`."""


def unsupported(param: str, why: str = "") -> InvalidBody:
    """Return the refusal of a parameter, or of its value, that this API does not support.

    `param` is the parameter as OpenAI's clients write it: `text.format.schema`, `messages[2].role`.
    """
    return _refusal(param, f"is not supported{f': {why}' if why else ''}", "unsupported_parameter")


def invalid(param: str, rule: str) -> InvalidBody:
    """Return the refusal of a parameter whose value breaks a rule, such as `must be a string`."""
    return _refusal(param, rule, "invalid_value")


def _refusal(param: str, rule: str, reason: str) -> InvalidBody:
    return InvalidBody(f"{param!r} {rule}", reason, [Violation(param, rule)])


def error_object(message: str, status: HTTPStatus, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error object as an answer or a chunk of a stream holds it."""
    kind = KINDS.get(status, "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
