"""Reads the lines of a chunk's items from the store, shortly before they run.

A request to the store costs as much as the bytes of many lines. So lines that lie near one another in the input are
read at once, and what is between them is dropped.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Final, NamedTuple

from batches.patience import patiently
from batches.plan import Planned, plan_range, read_records
from batches.splitting import RawLine
from llm_pb import common_pb2, internal_pb2
from store.store import Store, StoredObject

_AHEAD_BYTES: Final = 4 * 1024 * 1024
"""Size of the lines that are read together. The next ones are read while these begin."""
_MAX_GAP_BYTES: Final = 64 * 1024
"""Maximum distance of two lines that are read at once."""
_MAX_RANGE_BYTES: Final = 1024 * 1024
"""Size beyond which no further line is read at once."""
_CONCURRENT: Final = 8
"""Maximum number of concurrent requests."""


class PlacedLine(NamedTuple):
    """The line of an item."""

    place: int
    """Place of the item in its chunk, from 0."""
    raw: RawLine


class ChunkLines:
    """The lines of a chunk. The methods wait for a store that is away, and raise ObjectMissing."""

    def __init__(self, store: Store, request: internal_pb2.ChunkRequest) -> None:
        self._store = store
        self._request = request
        self._requests = asyncio.Semaphore(_CONCURRENT)

    async def plan(self) -> list[Planned]:
        """Return where the lines of the items are, in the order of the plan."""
        offset, size = plan_range(self._request.first, self._request.count)
        return read_records(await self._read(self._request.plan, offset, size))

    async def read(self, plan: Sequence[Planned], places: Iterable[int]) -> AsyncGenerator[PlacedLine, None]:
        """Yield the lines of the items at these places, in the order of the places. Some of them are in memory."""
        coming: asyncio.Task[list[PlacedLine]] | None = None
        try:
            for window in _windows(plan, places):
                ready, coming = coming, asyncio.create_task(self._window(plan, window))
                for line in await ready if ready is not None else ():
                    yield line
            for line in await coming if coming is not None else ():
                yield line
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    async def _window(self, plan: Sequence[Planned], places: Sequence[int]) -> list[PlacedLine]:
        found: dict[int, RawLine] = {}

        async def read(group: Sequence[int]) -> None:
            offset = plan[group[0]].offset
            size = plan[group[-1]].offset + plan[group[-1]].length - offset
            async with self._requests:
                data = await self._read(self._request.input, offset, size)
            for place in group:
                line = plan[place]
                begin = line.offset - offset
                found[place] = RawLine(line.index, line.offset, line.length, data[begin : begin + line.length])

        async with asyncio.TaskGroup() as reading:
            for group in _groups(plan, places):
                reading.create_task(read(group))
        return [PlacedLine(place, found[place]) for place in places]

    async def _read(self, ref: common_pb2.FileRef, offset: int, size: int) -> bytes:
        return await patiently(partial(self._read_once, ref, offset, size))

    async def _read_once(self, ref: common_pb2.FileRef, offset: int, size: int) -> bytes:
        content = bytearray()
        async with aclosing(
            self._store.read(StoredObject(ref.file_id, ref.size_bytes), offset, offset + size)
        ) as pieces:
            async for piece in pieces:
                content += piece
        return bytes(content)


def _windows(plan: Sequence[Planned], places: Iterable[int]) -> Iterator[list[int]]:
    """Yield the places whose lines are in memory together."""
    window, size = list[int](), 0
    for place in places:
        if window and size + plan[place].length > _AHEAD_BYTES:
            yield window
            window, size = [], 0
        window.append(place)
        size += plan[place].length
    if window:
        yield window


def _groups(plan: Sequence[Planned], places: Iterable[int]) -> Iterator[list[int]]:
    """Yield the places whose lines are read at once, in the order of the input."""
    group: list[int] = []
    for place in sorted(places, key=lambda place: plan[place].offset):
        line = plan[place]
        if group:
            last = plan[group[-1]]
            end, begin = last.offset + last.length, plan[group[0]].offset
            if line.offset - end > _MAX_GAP_BYTES or line.offset + line.length - begin > _MAX_RANGE_BYTES:
                yield group
                group = []
        group.append(place)
    if group:
        yield group
