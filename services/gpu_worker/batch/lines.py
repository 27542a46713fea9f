"""Reads the lines of a chunk's items from the store, shortly before they run."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Final, NamedTuple

from batches.plan import Planned, plan_range, read_records
from batches.splitting import RawLine
from llm_pb import file_pb2, internal_pb2
from services.gpu_worker.batch.patience import patiently
from store.store import Store, StoredObject

_AHEAD: Final = 8
"""Number of lines that are read before their items can run: a store may take longer to answer than a seat is free."""


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

    async def plan(self) -> list[Planned]:
        """Return where the lines of the items are, in the order of the plan."""
        offset, size = plan_range(self._request.first, self._request.count)
        return read_records(await self._read(self._request.plan, offset, size))

    async def read(self, plan: Sequence[Planned], places: Sequence[int]) -> AsyncGenerator[PlacedLine, None]:
        """Yield the lines of the items at these places. A few of them are in memory."""
        coming: deque[asyncio.Task[PlacedLine]] = deque()
        left = iter(places)
        try:
            while True:
                while len(coming) < _AHEAD and (place := next(left, None)) is not None:
                    coming.append(asyncio.create_task(self._line(place, plan[place])))
                if not coming:
                    return
                yield await coming.popleft()
        finally:
            for task in coming:
                task.cancel()
            await asyncio.gather(*coming, return_exceptions=True)

    async def _line(self, place: int, planned: Planned) -> PlacedLine:
        data = await self._read(self._request.input, planned.offset, planned.length)
        return PlacedLine(place, RawLine(planned.index, planned.offset, planned.length, data))

    async def _read(self, ref: file_pb2.FileRef, offset: int, size: int) -> bytes:
        return await patiently(partial(self._read_once, ref, offset, size))

    async def _read_once(self, ref: file_pb2.FileRef, offset: int, size: int) -> bytes:
        content = bytearray()
        async with aclosing(
            self._store.read(StoredObject(ref.file_id, ref.size_bytes), offset, offset + size)
        ) as pieces:
            async for piece in pieces:
                content += piece
        return bytes(content)
