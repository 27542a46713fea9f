"""A token bucket: how often something may happen, in seconds and on average, with bursts."""

import time
from collections.abc import Callable


class TokenBucket:
    """Fills with `per_second` tokens a second, up to `burst`. It is full at first."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self.per_second = per_second
        self.burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock()

    @property
    def available(self) -> int:
        """The number of tokens that can be taken now."""
        self._fill()
        return int(self._tokens)

    def take(self) -> float:
        """Take a token and return 0; or take none, and return after how many seconds there will be one."""
        self._fill()
        if self._tokens >= 1:
            self._tokens -= 1
            return 0
        return (1 - self._tokens) / self.per_second

    def put_back(self) -> None:
        """Put a token back that was taken for nothing."""
        self._fill()
        self._tokens = min(self._tokens + 1, self.burst)

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._filled_at) * self.per_second, self.burst)
        self._filled_at = now
