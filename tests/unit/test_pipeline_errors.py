"""The error of a step in the code of its pipeline."""

import pytest
from google.rpc import code_pb2
from temporalio.exceptions import ActivityError, ApplicationError

from jobs.errors import reason_of
from pipelines.errors import status_of


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("INVALID_JOB", code_pb2.INVALID_ARGUMENT),
        ("UNKNOWN_MODEL", code_pb2.NOT_FOUND),
        ("OF_THE_OPERATOR", code_pb2.FAILED_PRECONDITION),
    ],
)
def test_a_step_that_is_refused_has_the_code_of_its_reason(reason: str, code: int) -> None:
    """docs/errors.md has the codes. A step of the operator's code may name a reason of its own."""
    error = ActivityError(
        "", scheduled_event_id=1, started_event_id=2, identity="", activity_type="", activity_id="", retry_state=None
    )
    error.__cause__ = ApplicationError("why", type=reason, non_retryable=True)
    status = status_of(error)
    assert (status.code, reason_of(status), status.message) == (code, reason, "why")
