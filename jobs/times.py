"""A job's total time, and the part that is reserved to settle the outcome before Temporal ends the workflow."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from llm_pb import llm_pb2

_MAX_LEASES: Final = 2000
"""Maximum number of leases in a row that watch one job."""
_RESERVE: Final = timedelta(minutes=1)
"""Maximum part of a total time that is reserved."""
_TIME_TO_SETTLE: Final = timedelta(seconds=5)
"""Minimum time between the end of the last attempt and the end of the workflow. Temporal's timers are up to a second
late, so in less time Temporal may end the workflow before it has settled its outcome."""


def execution_timeout(total: timedelta) -> timedelta:
    """Return the execution timeout of a job's workflow.

    It is the job's total time, extended if the reserved part is too short to settle the outcome.
    """
    return total + max(_TIME_TO_SETTLE - _reserve(total), timedelta(0))


@dataclass(frozen=True)
class TotalTime:
    """The total time of one job, as its workflow keeps it."""

    start: datetime
    total: timedelta
    """The total time that the job or its gateway chose."""
    limit: timedelta | None
    """The workflow's execution timeout. None for a workflow that was started by hand without one."""

    def to_run(self, now: datetime) -> timedelta:
        """Return the time that is left for attempts."""
        limits = (self.total, self.limit or self.total)
        end = self.start + min(limit - _reserve(limit) for limit in limits)
        return max(end - now, timedelta(milliseconds=1))

    @property
    def end(self) -> datetime:
        """When Temporal ends the workflow, or would end it if it had an execution timeout."""
        return self.start + (self.limit or execution_timeout(self.total))

    @property
    def ends_workflow(self) -> bool:
        """Whether Temporal ends the workflow soon after the total time is spent."""
        return self.limit is not None and self.limit <= execution_timeout(self.total)


def watch_lease(job: llm_pb2.JobRequest, total: timedelta) -> timedelta | None:
    """Return the time after which the job is cancelled if nobody watches it; None for a job that runs unwatched.

    `total` is the job's total time. Each lease costs up to 20 events, and a history holds 51,200.
    """
    if not job.HasField("cancel_if_unwatched"):
        return None
    return max(job.cancel_if_unwatched.ToTimedelta(), total / _MAX_LEASES)


def _reserve(limit: timedelta) -> timedelta:
    """Return the time that is reserved to settle the outcome and notify its receivers."""
    return min(_RESERVE, limit / 10)
