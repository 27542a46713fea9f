"""A call of the client for code without asyncio, from its thread to that of the loop."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Call(Generic[T]):
    """A coroutine that a loop's thread runs for another thread."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.ended = threading.Event()
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None

    def start(self) -> None:
        """Start the coroutine. Call it in the loop's thread."""
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        """End the coroutine, also before its start. Call it in the loop's thread, or after that thread has ended."""
        if self._task is None:
            self._coroutine.close()
            self.ended.set()
        elif not self._task.done():
            self._task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            # After Ctrl-C nobody asks for the result, and asyncio would log the exception.
            task.exception()
        self.ended.set()

    def result(self) -> T:
        """Return the result of the coroutine, which has ended. Raises its exception, or CancelledError."""
        assert self._task is not None  # noqa: S101  # it has ended
        return self._task.result()
