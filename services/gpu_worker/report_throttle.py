"""Throttling of attempts' reports: the more attempts run concurrently, the less often each reports.

A report costs the same whether the job is one of three or of three hundred: a record of the feed that every watcher
receives, or a call to Temporal. So beyond a number of jobs the worker as a whole reports no more often.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

_UNTHROTTLED: Final = 16
"""Maximum number of concurrent attempts that each report as often as the settings say."""


class ReportThrottle:
    """Counts the attempts of a worker, and stretches their intervals."""

    def __init__(self) -> None:
        self._attempts = 0

    @property
    def attempts(self) -> int:
        """The number of attempts that run."""
        return self._attempts

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Count one attempt while the context is open."""
        self._attempts += 1
        try:
            yield
        finally:
            self._attempts -= 1

    def seconds(self, interval: timedelta) -> float:
        """Return how long the interval is now, in seconds."""
        return interval.total_seconds() * max(1.0, self._attempts / _UNTHROTTLED)


class ReportTimer:
    """Shows when an attempt's next report is due. The first one is due immediately."""

    def __init__(self, throttle: ReportThrottle, interval: timedelta) -> None:
        """`interval` is the time between two reports, before the throttle stretches it."""
        self._throttle = throttle
        self._interval = interval
        self._restarted_at = -math.inf

    @property
    def expired(self) -> bool:
        """Whether a report is due."""
        return time.monotonic() - self._restarted_at >= self._throttle.seconds(self._interval)

    def restart(self) -> None:
        """Note that a report is sent now."""
        self._restarted_at = time.monotonic()

    def expire(self) -> None:
        """Make the next report due now."""
        self._restarted_at = -math.inf
