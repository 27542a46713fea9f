"""The device of the process: one computation at a time, in a thread, so that the event loop stays free."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any


class Device:
    """Runs computations one after the other, those of several trainings in turn."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self.lost = asyncio.Event()
        """Set once the device cannot be used any more by this process."""

    async def require(self) -> None:
        """Wait until the device is lost, and raise RuntimeError then: another process may find a good one."""
        await self.lost.wait()
        raise RuntimeError("the trainer has lost its GPU")

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in a thread and return its result. A cancel waits for the end of the function."""
        async with self._turn:
            running = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                # A second cancel must not give the device away before that.
                while not running.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([running])
                raise
