"""How a job closes that has spent its total time."""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from temporalio import workflow
from temporalio.exceptions import ApplicationError

from jobs import errors, names
from jobs.times import TotalTime, execution_timeout
from workflows.cancellation import Cancellation
from workflows.outcome import raise_failure

TOTAL = timedelta(minutes=3)
TIME = TotalTime(datetime(2026, 1, 1, tzinfo=UTC), TOTAL, execution_timeout(TOTAL))


class _Waits(Exception):
    """The workflow waits for Temporal to end it."""


class _Waiting:
    async def wait(self, _: Any) -> None:
        raise _Waits


@pytest.mark.parametrize("closes_itself", [True, False])
async def test_only_a_job_that_is_told_so_closes_before_temporal_ends_it(
    monkeypatch: pytest.MonkeyPatch, closes_itself: bool
) -> None:
    """A step with a timeout of three minutes ended 18 seconds after its job."""
    memo = {names.MEMO_CLOSES_ITSELF: True} if closes_itself else {}
    monkeypatch.setattr(workflow, "memo_value", lambda name, default: memo.get(name, default))
    waiting = cast("Cancellation", _Waiting())
    with pytest.raises(ApplicationError if closes_itself else _Waits):
        await raise_failure(errors.TotalTimeout("spent"), None, waiting, TIME)
