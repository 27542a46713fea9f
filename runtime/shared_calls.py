"""Shares one call to another server among all who ask the same concurrently: a storm of requests costs it two calls."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

_V = TypeVar("_V")


class SharedCalls:
    """Calls by key. Their results are shared, so nobody may change them."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, asyncio.Task[Any]] = {}
        self._running: dict[Hashable, asyncio.Task[Any]] = {}

    async def fresh(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, _V]]) -> _V:
        """Return the result of a call that begins now, or once the running call with this key has ended.

        The result is never older than the request for it: who asks while a call runs waits for the next one, together
        with all others who do so. Raises what the call raises.
        """
        task = self._waiting.get(key)
        if task is None:
            task = self._waiting[key] = asyncio.create_task(self._next(key, call))
            # Those who asked may all be gone when it fails.
            task.add_done_callback(_retrieve)
        return await asyncio.shield(task)

    async def _next(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, _V]]) -> _V:
        while (running := self._running.get(key)) is not None:
            await asyncio.wait([running])
        # Who asks from here on is too late for this call.
        self._running[key] = self._waiting.pop(key)
        try:
            return await call()
        finally:
            del self._running[key]

    async def joined(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, _V]]) -> _V:
        """Return the result of the call with this key that runs, or of a new one if none does. Raises like fresh()."""
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(call())
            task.add_done_callback(_retrieve)
            task.add_done_callback(lambda _: self._running.pop(key))
        return await asyncio.shield(task)


def _retrieve(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()
