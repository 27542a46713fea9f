"""Writes results to the store as segments, and merges small segments so that a heartbeat names few.

A segment is written once, under a name that nobody else knows. So what an attempt writes after Temporal has given it up
is never read.
"""

import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Final

from batches.objects import segments_folder
from batches.segments import SegmentParser, to_segment
from llm_pb import batch_pb2, common_pb2, internal_pb2
from store.store import MAX_PIECE_BYTES, Store, StoredObject

MAX_SEGMENTS: Final = 8
"""Maximum number of segments of a chunk, as ChunkResult.segments says."""
_MERGED: Final = 6
"""Number of segments that are merged at once. They are the smallest, so that a result is rewritten few times."""


class SegmentWriter:
    """The segments of one chunk. The methods raise StoreUnavailable, KeysUnavailable."""

    def __init__(self, store: Store, request: internal_pb2.ChunkRequest, known: Iterable[common_pb2.FileRef]) -> None:
        """`known` are the segments of earlier attempts."""
        self._store = store.of_tenant(request.tenant)
        self._folder = segments_folder(request.batch_id, request.tenant)
        self._refs = [*known]

    async def with_items(self, items: Sequence[batch_pb2.BatchItem]) -> list[common_pb2.FileRef]:
        """Write some items; return the segments that hold them and all earlier ones. Call `keep` with them.

        The segments before are left in the store, because readers may still read them.
        """
        if len(self._refs) < MAX_SEGMENTS:
            return [*self._refs, await self._put(_once(to_segment(items)))]
        by_size = sorted(self._refs, key=lambda ref: ref.size_bytes)
        merged = await self._put(self._merged(by_size[:_MERGED], items))
        return [*by_size[_MERGED:], merged]

    def keep(self, refs: Iterable[common_pb2.FileRef]) -> None:
        """Make these the segments of the chunk."""
        self._refs = [*refs]

    @property
    def refs(self) -> Sequence[common_pb2.FileRef]:
        """The segments of the chunk."""
        return self._refs

    async def _put(self, pieces: AsyncGenerator[bytes, None]) -> common_pb2.FileRef:
        async with aclosing(pieces):
            stored = await self._store.put(self._store.new_name(self._folder), pieces)
        return common_pb2.FileRef(file_id=stored.name, size_bytes=stored.size)

    async def _merged(
        self, refs: Iterable[common_pb2.FileRef], items: Sequence[batch_pb2.BatchItem]
    ) -> AsyncGenerator[bytes, None]:
        """Yield the pieces of one segment that holds these segments and items. One item of each is in memory."""
        async with AsyncExitStack() as opened:
            sources: list[AsyncIterator[batch_pb2.BatchItem]] = [
                *[await opened.enter_async_context(aclosing(self._items_of(ref))) for ref in refs],
                _each(sorted(items, key=lambda item: item.index)),
            ]
            heads: list[tuple[int, int, batch_pb2.BatchItem]] = []
            for number, source in enumerate(sources):
                if (item := await anext(source, None)) is not None:
                    heads.append((item.index, number, item))
            heapq.heapify(heads)
            piece = bytearray()
            while heads:
                _, number, item = heads[0]
                piece += to_segment([item])
                if (following := await anext(sources[number], None)) is None:
                    heapq.heappop(heads)
                else:
                    heapq.heapreplace(heads, (following.index, number, following))
                if len(piece) >= MAX_PIECE_BYTES:
                    yield bytes(piece)
                    piece.clear()
            yield bytes(piece)

    async def _items_of(self, ref: common_pb2.FileRef) -> AsyncGenerator[batch_pb2.BatchItem, None]:
        parser = SegmentParser()
        async with aclosing(self._store.read(StoredObject(ref.file_id, ref.size_bytes))) as pieces:
            async for piece in pieces:
                for item in parser.feed(piece):
                    yield item
        parser.close()


async def _once(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


async def _each(items: Iterable[batch_pb2.BatchItem]) -> AsyncGenerator[batch_pb2.BatchItem, None]:
    for item in items:
        yield item
