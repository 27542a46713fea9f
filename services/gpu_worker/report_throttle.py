"""Throttling of attempts' reports: the more attempts run concurrently, the less often each reports.

A report costs the same whether the job is one of three or of three hundred: a record of the feed that every watcher
receives, or a call to Temporal. So beyond a number of jobs the worker as a whole reports no more often. Their output is
a report, too: a record of many tokens costs worker, broker and gateway about as much as one with a single token.
"""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final, Protocol

_UNTHROTTLED: Final = 16
"""Maximum number of concurrent attempts that each report as often as the settings say."""


class Publishes(Protocol):
    """An attempt that holds output back."""

    async def publish(self) -> None:
        """Publish what is held back. Raises nothing."""
        ...


class ReportThrottle:
    """Counts the attempts of a worker, stretches their intervals, and publishes what they hold back."""

    def __init__(self, output_records_per_second: float = math.inf, output_interval: float = 0.0) -> None:
        """`output_records_per_second` limits the records of output of all attempts together, where they are many.

        `output_interval` is the minimum time between two records of an attempt's output, in seconds.
        """
        self._attempts = 0
        self._output_rate = output_records_per_second
        self._output_interval = output_interval
        self._holding: set[Publishes] = set()
        self._publishing: asyncio.Task[None] | None = None

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

    @property
    def output_seconds(self) -> float:
        """The minimum time between two records of one attempt's output now, in seconds."""
        if self._attempts <= _UNTHROTTLED:
            return self._output_interval
        return max(self._output_interval, self._attempts / self._output_rate)

    def publish_later(self, attempt: Publishes) -> None:
        """Schedule an attempt's publish() within `output_seconds`, together with others that hold output back."""
        self._holding.add(attempt)
        if self._publishing is None or self._publishing.done():
            self._publishing = asyncio.create_task(self._publish_held())

    async def _publish_held(self) -> None:
        while self._holding:
            await asyncio.sleep(self.output_seconds)
            holding, self._holding = self._holding, set()
            for attempt in holding:
                await attempt.publish()


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
