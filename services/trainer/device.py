"""The device of the process: one computation at a time, in a thread, so that the event loop stays free."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any


class Device:
    """Runs computations one after the other, those of several trainings in turn."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

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
