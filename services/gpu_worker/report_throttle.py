"""How often attempts report: the more of them run at once, the less often each.

A report costs the same whether the job is one of three or of three hundred: a record of the feed that every watcher is
sent, or a call of Temporal's. So beyond a number of jobs the worker as a whole reports no more often.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

_FULL_PACE: Final = 16
"""Attempts at once that each report as often as the settings say."""


class Pace:
    """Counts the attempts of a worker, and stretches their intervals."""

    def __init__(self) -> None:
        self._running = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be one of the attempts while the context is open."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def seconds(self, interval: timedelta) -> float:
        """Return how long the interval is now."""
        return interval.total_seconds() * max(1.0, self._running / _FULL_PACE)
