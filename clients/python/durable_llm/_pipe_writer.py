"""Writes to pipes and devices, which may keep a writer waiting. A cancel ends each wait: no thread is left in it."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

_READER_INTERVAL: Final = 0.05
"""Seconds between two looks whether a named pipe has a reader by now. Nothing notifies of it."""


class PipeWriter:
    """An open pipe or device."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def write(self, data: bytes) -> None:
        """Write bytes once there is room for them. Raises OSError, BrokenPipeError among it."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                await self._room()

    async def _room(self) -> None:
        loop, room = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(self._descriptor, room.set)
        try:
            await room.wait()
        finally:
            loop.remove_writer(self._descriptor)


@asynccontextmanager
async def open_pipe(path: Path) -> AsyncIterator[PipeWriter]:
    """Open a pipe, once somebody reads it, or a device. Raises OSError."""
    descriptor = await _open(path)
    try:
        yield PipeWriter(descriptor)
    finally:
        os.close(descriptor)


async def _open(path: Path) -> int:
    # Windows has neither the flag nor pipes with a path.
    flags = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)
    while True:
        try:
            return os.open(path, flags)
        except OSError as error:
            if error.errno != errno.ENXIO or not await asyncio.to_thread(path.is_fifo):
                raise
        await asyncio.sleep(_READER_INTERVAL)
