"""StreamBatch and StreamBatchResults: a batch while it runs, and what its items have produced."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Final

from batches.plan import plan_range, read_records
from batches.segments import SegmentParser
from jobs import batches
from jobs.field_rules import Violation
from llm_pb import batch_pb2, common_pb2, internal_pb2
from runtime.answers import MAX_MESSAGE_BYTES, Answer
from runtime.auth import Caller
from runtime.keyed_limiter import KeyedLimiter
from services.gateway.batches.cursor import Cursor
from services.gateway.batches.local_files import stored
from services.gateway.batches.merging import read_manifest
from services.gateway.batches.reader import BatchReader, BatchView, wait_a_moment
from services.gateway.cursor_text import BadCursor
from services.gateway.errors import content_unreadable, exhausted, files_disabled, invalid, shutting_down
from services.gateway.files.failures import store_errors
from services.gateway.settings import GatewaySettings
from services.gateway.streams.watchers import Watchers
from store.store import ObjectMissing, Store

_MAX_ITEMS: Final = 100
_MISSING: Final = 5
"""Number of times that an object may be missing: a chunk has replaced it since the batch was read."""
_SHORT_SECONDS: Final = 0.1
"""First pause after a look at a batch that is about to end. Output and errors of a small one take no second."""
_CURSOR_BYTES: Final = 8 * 1024
_OVERHEAD: Final = 8
"""Bytes that an item adds to a message in addition to its own size, rounded up."""


class BatchStreams:
    """The streams of batches that this gateway serves."""

    def __init__(self, reader: BatchReader, store: Store | None, settings: GatewaySettings) -> None:
        self._reader = reader
        self._store = store
        self._poll = max(settings.poll.total_seconds(), 1.0)
        self._stopping = asyncio.Event()
        readers = settings.max_downloads
        self._watchers = Watchers(settings, "batches")
        self._readers = KeyedLimiter(
            readers, lambda: exhausted(f"this gateway serves {readers} streams of results; call again or call another")
        )
        self._of_tenant = KeyedLimiter(
            -(-readers // 2), lambda: exhausted("a tenant may have half of the streams of results; end one first")
        )

    def close(self) -> None:
        """End every stream with UNAVAILABLE. Its client continues with another gateway, or with this one later."""
        self._stopping.set()

    async def watch(
        self, caller: Caller, request: batch_pb2.StreamBatchRequest, answer: Answer
    ) -> AsyncGenerator[batch_pb2.StreamBatchResponse, None]:
        """Yield the messages of StreamBatch. Raises ApiError, RPCError."""
        last, pauses = None, Pauses(self._poll)
        async with self._watchers.acquired(caller):
            while True:
                status = await self._reader.status(caller, request.batch_id)
                if status != last:
                    message, last = batch_pb2.StreamBatchResponse(status=status), status
                    answer.sending(message.ByteSize())
                    # The yield returns once gRPC has sent the message.
                    yield message
                    answer.left()
                if status.state in batches.FINAL_STATES:
                    return
                await self._wait(pauses.after(status.state))

    async def results(
        self, caller: Caller, request: batch_pb2.StreamBatchResultsRequest, answer: Answer
    ) -> AsyncGenerator[batch_pb2.StreamBatchResultsResponse, None]:
        """Yield the messages of StreamBatchResults. Raises ApiError, RPCError, KeysUnavailable, PayloadError."""
        if self._store is None:
            raise files_disabled()
        try:
            cursor = Cursor(request.batch_id, request.cursor)
        except BadCursor as error:
            raise invalid([Violation("cursor", f"must be a cursor of this batch: {error}")]) from None
        async with self._readers.acquired(), self._of_tenant.acquired(caller.tenant):
            reading, missing, pauses = _Reading(self._store, cursor), 0, Pauses(self._poll)
            while True:
                view = await self._reader.view(caller, request.batch_id)
                if cursor.is_of_another_run(view.record.status.create_time):
                    reading = _Reading(self._store, cursor)
                try:
                    with store_errors(request.batch_id):
                        async for items in reading.news(view):
                            message = batch_pb2.StreamBatchResultsResponse(items=items, cursor=cursor.encode())
                            answer.sending(message.ByteSize())
                            yield message
                            answer.left()
                            missing = 0
                except _Replaced as error:
                    missing += 1
                    if missing == _MISSING:
                        raise content_unreadable("a part of the results is no more in the store") from error
                else:
                    if view.record.status.state in batches.FINAL_STATES:
                        return
                await self._wait(pauses.after(view.record.status.state))

    async def _wait(self, seconds: float) -> None:
        if await wait_a_moment(self._stopping, seconds):
            raise shutting_down()


class Pauses:
    """The pauses of a stream between two looks at its batch. They begin again short once the batch is about to end."""

    def __init__(self, usual: float) -> None:
        self._usual = usual
        self._next = _SHORT_SECONDS

    def after(self, state: "batch_pb2.BatchState.ValueType") -> float:
        """Return the seconds until the next look at a batch that was seen in this state."""
        if state != batch_pb2.BATCH_STATE_FINALIZING:
            return self._usual
        pause, self._next = self._next, min(2 * self._next, self._usual)
        return pause


class _Replaced(Exception):
    """An object is missing that was there when the batch was read."""


class _Reading:
    """What one reader has of a batch, and what is new."""

    def __init__(self, store: Store, cursor: Cursor) -> None:
        self._store = store
        self._cursor = cursor
        self._chunks: list[batches.Chunk] = []
        self._manifests: set[str] = set()
        """Manifests of which everything was delivered."""
        self._segments: dict[int, set[str]] = {}
        """Segments of which everything was delivered, by the chunks of which something is missing."""
        self._whole: dict[int, int] = {}
        """The bits of ended chunks, from the cursor on."""

    async def news(self, view: BatchView) -> AsyncGenerator[list[batch_pb2.BatchItem], None]:
        """Yield the items that were not delivered, some at a time. The cursor is behind what was yielded last."""
        record = view.record
        if not self._chunks and record.progress.HasField("plan"):
            self._chunks = batches.chunks_of(record.progress.plan, record.options)
        try:
            for ref in record.progress.manifests:
                if ref.file_id not in self._manifests:
                    for chunk in (await read_manifest(self._store, ref)).chunks:
                        async for items in self._of_chunk(record, chunk, ended=True):
                            yield items
                    self._manifests.add(ref.file_id)
            for chunk in record.progress.recent:
                async for items in self._of_chunk(record, chunk, ended=True):
                    yield items
            for pending in view.pending:
                async for items in self._of_chunk(record, pending.ended, ended=False):
                    yield items
            if record.progress.HasField("rest") and record.status.state in batches.FINAL_STATES:
                async for items in self._of_rest(record.progress.rest):
                    yield items
        except ObjectMissing as error:
            raise _Replaced from error

    async def _of_chunk(
        self, record: internal_pb2.BatchRecord, chunk: internal_pb2.EndedChunk, *, ended: bool
    ) -> AsyncGenerator[list[batch_pb2.BatchItem], None]:
        if not 0 <= chunk.chunk < len(self._chunks):
            return
        number, done = chunk.chunk, int.from_bytes(chunk.result.done, "little")
        if done & ~self._cursor.bits(number):
            planned = self._chunks[number]
            read = self._segments.setdefault(number, set())
            place_of = await self._places(record.progress.plan.plan, planned)
            for ref in chunk.result.segments:
                if ref.file_id in read:
                    continue
                async for group in self._groups(ref):
                    fresh = []
                    for item in group:
                        place = place_of.get(item.index)
                        if place is not None and not self._cursor.bits(number) >> place & 1:
                            self._cursor.deliver(number, place)
                            fresh.append(item)
                    if fresh:
                        yield fresh
                read.add(ref.file_id)
        if ended and number >= self._cursor.low:
            self._segments.pop(number, None)
            self._whole[number] = done
            self._cursor.pass_ended(self._whole)

    async def _places(self, plan: common_pb2.FileRef, chunk: batches.Chunk) -> dict[int, int]:
        """Return the place within the chunk of each line."""
        start, size = plan_range(chunk.first, chunk.items)
        data = b"".join([piece async for piece in self._store.read(stored(plan), start, start + size)])
        return {planned.index: place for place, planned in enumerate(read_records(data))}

    async def _of_rest(self, rest: common_pb2.FileRef) -> AsyncGenerator[list[batch_pb2.BatchItem], None]:
        delivered = self._cursor.rest
        async for group in self._groups(rest):
            fresh = group[delivered:]
            delivered = max(delivered - len(group), 0)
            if fresh:
                self._cursor.rest += len(fresh)
                yield fresh

    async def _groups(self, segment: common_pb2.FileRef) -> AsyncIterator[list[batch_pb2.BatchItem]]:
        """Yield the items of a segment in groups that fit a message."""
        group: list[batch_pb2.BatchItem] = []
        size, parser = 0, SegmentParser()
        async with aclosing(self._store.read(stored(segment))) as pieces:
            async for piece in pieces:
                for item in parser.feed(piece):
                    more = item.ByteSize() + _OVERHEAD
                    if group and (len(group) == _MAX_ITEMS or size + more > MAX_MESSAGE_BYTES - _CURSOR_BYTES):
                        yield group
                        group, size = [], 0
                    group.append(item)
                    size += more
        parser.close()
        if group:
            yield group
