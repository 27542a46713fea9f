"""Limits by key, a user or a destination for example, so that a slow one leaves room for others."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class KeyedLimiter:
    """A limiter for each key: `at_once` holders concurrently, and `waiting` more that wait."""

    def __init__(self, at_once: int, error: Callable[[], Exception], *, waiting: int = 0) -> None:
        """`error` creates the exception that is raised when no more may wait."""
        self._error = error
        self._most = at_once + waiting
        self._count: Counter[str] = Counter()
        self._free: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(at_once))

    @asynccontextmanager
    async def acquired(self, key: str = "") -> AsyncIterator[None]:
        """Hold the key's limiter while the context is open. Raises the error immediately when too many wait already."""
        if self._count[key] >= self._most:
            raise self._error()
        self._count[key] += 1
        try:
            async with self._free[key]:
                yield
        finally:
            self._count[key] -= 1
            if not self._count[key]:
                del self._count[key], self._free[key]
