"""Which refusals of a gateway a step of a pipeline waits out."""

from datetime import timedelta

import pytest
from temporalio.exceptions import ApplicationError

from services.gateway.errors import ApiError, exhausted, files_disabled, quota_exceeded, store_unavailable
from services.gateway.pipelines.texts import fail

SHORT, LONG = timedelta(seconds=7), timedelta(hours=7)


def test_a_limit_that_names_a_short_time_is_tried_again_after_it() -> None:
    """Every limit ended the step, and the pipeline with it."""
    with pytest.raises(ApplicationError) as raised:
        fail(exhausted("too many", SHORT))
    error = raised.value
    assert (error.type, error.non_retryable, error.next_retry_delay) == ("LIMIT_REACHED", False, SHORT)


@pytest.mark.parametrize(
    "refusal",
    [
        exhausted("too many", LONG),
        # Of files: nobody knows when one goes.
        quota_exceeded("acme", "bytes", "no room", SHORT),
        quota_exceeded("acme", "bytes", "it never fits", None),
        files_disabled(),
    ],
)
def test_every_other_refusal_is_final(refusal: ApiError) -> None:
    with pytest.raises(ApplicationError) as raised:
        fail(refusal)
    assert raised.value.non_retryable


def test_what_is_away_is_tried_again_at_the_pace_of_the_step() -> None:
    with pytest.raises(ApplicationError) as raised:
        fail(store_unavailable())
    assert (raised.value.non_retryable, raised.value.next_retry_delay) == (False, None)
