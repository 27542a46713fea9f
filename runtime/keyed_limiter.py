"""Who may go on at once: bounds by user and by destination, so that what is slow leaves room for others."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from jobs.errors import DeliveryFailed


class Turns:
    """Lets so many at once in for each key, and so many wait."""

    def __init__(self, what: str, at_once: int, waiting: int = 0) -> None:
        """`what` is said of those that are there already when there are too many, in the plural."""
        self._what = what
        self._most = at_once + waiting
        self._count: Counter[str] = Counter()
        self._free: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(at_once))

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[None]:
        """Be let in while the context is open. Raises DeliveryFailed at once when too many wait."""
        if self._count[key] >= self._most:
            raise DeliveryFailed(f"{self._most} {self._what} are under way already")
        self._count[key] += 1
        try:
            async with self._free[key]:
                yield
        finally:
            self._count[key] -= 1
            if not self._count[key]:
                del self._count[key], self._free[key]
