"""The errors of the HTTP front: every code of gRPC has a status, and a failure says when to call again."""

from datetime import timedelta
from http import HTTPStatus

import grpc
import pytest

from durable_llm import ApiError
from durable_llm.errors import Violation
from services.http.failures import STATUS, Failure, of_call, with_fields
from services.http.rest.problems import problem


def test_every_code_but_ok_has_the_status_of_an_error() -> None:
    assert STATUS.keys() == {*grpc.StatusCode} - {grpc.StatusCode.OK}
    assert all(status >= HTTPStatus.BAD_REQUEST for status in STATUS.values())


@pytest.mark.parametrize(
    ("delay", "header"), [(timedelta(milliseconds=1), "1"), (timedelta(seconds=2.1), "3"), (None, None)]
)
def test_the_wait_of_a_limit_is_rounded_up(delay: timedelta | None, header: str | None) -> None:
    failure = of_call(ApiError("full", grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED", delay))
    assert failure.headers.get("Retry-After") == header


def test_an_error_of_the_connection_does_not_tell_addresses() -> None:
    failure = of_call(ApiError("ipv4:10.0.0.1:50051: connection refused", grpc.StatusCode.UNAVAILABLE))
    assert "10.0.0.1" not in failure.message
    assert (failure.status, failure.headers["Retry-After"]) == (503, "1")


def test_a_gateway_that_is_too_slow_is_said_in_plain_words() -> None:
    failure = of_call(ApiError("Deadline Exceeded", grpc.StatusCode.DEADLINE_EXCEEDED))
    assert failure.message == "the gateway has not answered in time; call again"
    assert (failure.status, failure.headers["Retry-After"]) == (504, "1")


def test_fields_get_the_names_of_the_body() -> None:
    violations = [Violation("job.user_id", "is required"), Violation("job.model", "is unknown")]
    failure = Failure(HTTPStatus.BAD_REQUEST, "job.user_id is required", "INVALID_REQUEST", violations)
    assert problem(with_fields(failure, lambda field: field.removeprefix("job."))) == {
        "title": "Bad Request",
        "status": 400,
        "detail": "user_id is required; model is unknown",
        "reason": "INVALID_REQUEST",
        "errors": [{"field": "user_id", "message": "is required"}, {"field": "model", "message": "is unknown"}],
    }
