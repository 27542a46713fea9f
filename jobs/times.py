"""A job's total time, and how much of it is kept back to settle the outcome before Temporal ends the workflow."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

_RESERVE: Final = timedelta(minutes=1)
"""Maximum part of a total time that is kept back."""
_TIME_TO_SETTLE: Final = timedelta(seconds=5)
"""Minimum time between the end of the last attempt and the end of the workflow. Temporal's timers are up to a second
late, so in less time Temporal may end the workflow before it has settled its outcome."""


def execution_timeout(total: timedelta) -> timedelta:
    """Return after what time Temporal ends the workflow of a job.

    That is the job's total time itself, unless what is kept back of it is shorter than it takes to settle the outcome.
    """
    return total + max(_TIME_TO_SETTLE - _reserve(total), timedelta(0))


@dataclass(frozen=True)
class TotalTime:
    """The total time of one job, as its workflow keeps it."""

    start: datetime
    total: timedelta
    """What the job or its gateway has chosen."""
    limit: timedelta | None
    """The workflow's execution timeout. None for a workflow that was started by hand without one."""

    def to_run(self, now: datetime) -> timedelta:
        """Return what is left for attempts."""
        limits = (self.total, self.limit or self.total)
        end = self.start + min(limit - _reserve(limit) for limit in limits)
        return max(end - now, timedelta(milliseconds=1))

    @property
    def end(self) -> datetime:
        """When Temporal ends the workflow, or would."""
        return self.start + (self.limit or execution_timeout(self.total))

    @property
    def ends_workflow(self) -> bool:
        """Whether Temporal is about to end the workflow once the total time is spent."""
        return self.limit is not None and self.limit <= execution_timeout(self.total)


def _reserve(limit: timedelta) -> timedelta:
    """Return how much is kept back to settle and tell the outcome."""
    return min(_RESERVE, limit / 10)
