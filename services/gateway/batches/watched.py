"""RunBatchChunk of items with "watch": true: each is a job of its own, and its result is that of any other item.

A GPU worker runs the items of other chunks itself. Here the jobs run by themselves, whatever becomes of an attempt: the
next one follows them. A chunk is stopped by a run of its own, because an attempt that is cancelled may have no process
any more, and its jobs must end nevertheless.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Final, TypeVar

from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from batches.chunk import Chunk, usage_of
from batches.chunk_lines import ChunkLines, PlacedLine
from batches.grants import Grant
from batches.lines import Line, LineReader
from batches.patience import patiently
from batches.results import bad_item
from batches.segment_writer import SegmentWriter
from encryption import KeysUnavailable
from jobs import batches, names
from llm_pb import batch_pb2, internal_pb2, llm_pb2
from services.gateway.batches.watched_jobs import WatchedJobs, deleted
from services.gateway.metrics import GatewayMetrics
from store.store import ObjectMissing, Store

_log = logging.getLogger(__name__)
_FLUSH_SECONDS: Final = 1.0
"""Time after which results are written to the store."""
_RETRY_SECONDS: Final = 2.0
_LOOKS: Final = (0, 1, 2)
"""Seconds before each look for a job that was started. Temporal has been seen to deny one under load."""
_RETRY_DELAY: Final = timedelta(milliseconds=100)
"""Wait before the next attempt at a chunk whose gateway stops."""
_T = TypeVar("_T")


class RunWatchedChunk:
    """The activity."""

    def __init__(self, store: Store | None, jobs: WatchedJobs, metrics: GatewayMetrics) -> None:
        self._store = store
        self._jobs = jobs
        self._metrics = metrics

    @activity.defn(name=names.ACTIVITY_RUN_BATCH_CHUNK)
    async def __call__(self, request: internal_pb2.ChunkRequest) -> internal_pb2.ChunkResult:
        """Run the items that are not done. Return the chunk as it is then, also when it is cancelled.

        With `request.error` none begins: jobs of earlier attempts are cancelled, and their items end with it.
        """
        if self._store is None:
            raise ApplicationError("the gateway has no store (STORE_URL), which batches need", type="NO_STORE")
        info = activity.info()
        earlier = batches.later(batches.result_in(info.heartbeat_details), request.earlier)
        chunk = Chunk(request, earlier, request.earlier.attempts + info.attempt)
        run = _Run(
            request,
            chunk,
            self._store,
            self._jobs,
            SegmentWriter(self._store, request, earlier.segments),
            self._metrics,
        )
        try:
            await run.run()
        except ObjectMissing as error:
            raise ApplicationError(str(error), chunk.result(), type=batches.INPUT_GONE, non_retryable=True) from error
        return chunk.result()


class _Run:
    """One attempt at one chunk."""

    def __init__(
        self,
        request: internal_pb2.ChunkRequest,
        chunk: Chunk,
        store: Store,
        jobs: WatchedJobs,
        segments: SegmentWriter,
        metrics: GatewayMetrics,
    ) -> None:
        self._request = request
        self._chunk = chunk
        self._jobs = jobs
        self._segments = segments
        self._metrics = metrics
        self._lines = ChunkLines(store, request)
        self._reader = LineReader(request.batch)
        self._grant = Grant(request, chunk.usage, 0)
        self._stopping = request.HasField("error")
        self._room = asyncio.Semaphore(request.max_concurrent or request.count)
        self._running = 0
        self._ended: list[tuple[int, batch_pb2.BatchItem]] = []

    async def run(self) -> None:
        """Run until every item has ended, or the chunk is cancelled.

        Raises ApplicationError when the gateway stops, CancelledError when Temporal has given the attempt up.
        """
        working = asyncio.create_task(self._work())
        working.add_done_callback(lambda done: done.cancelled() or done.exception())
        leaving = asyncio.create_task(activity.wait_for_worker_shutdown())
        try:
            while not working.done():
                try:
                    await asyncio.wait({working, leaving}, timeout=_FLUSH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    await self._flush()
                except asyncio.CancelledError:
                    details = activity.cancellation_details()
                    if details is None or not details.cancel_requested:
                        raise
                    # The batch stops the jobs by another run.
                    await self._flush()
                    return
                if leaving.done() and not working.done():
                    message = "the gateway was asked to stop"
                    raise ApplicationError(message, type="WORKER_SHUTDOWN", next_retry_delay=_RETRY_DELAY)
            if self._grant.needed is not None:
                self._chunk.need(self._grant.needed)
            await self._flush()
            try:
                working.result()
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _work(self) -> None:
        plan = await self._lines.plan()
        async with asyncio.TaskGroup() as group, aclosing(self._lines.read(plan, self._chunk.todo())) as lines:
            async for placed in lines:
                line = self._reader.read(placed.raw)
                if line.job is not None and not await self._grant.reserve(placed.place, line.job):
                    return
                await self._room.acquire()
                group.create_task(self._run_item(placed, line))

    async def _run_item(self, placed: PlacedLine, line: Line) -> None:
        self._running += 1
        try:
            item = await self._item(line)
        finally:
            self._running -= 1
        if item is not None:
            self._grant.settle(placed.place, item, usage_of(item))
        self._grant.release(placed.place)
        if item is None:
            self._room.release()
            return
        self._ended.append((placed.place, item))
        state = llm_pb2.JobState.Name(item.state).removeprefix("JOB_STATE_").lower()
        model = "" if line.job is None else line.job.model
        self._metrics.batch_items.add(1, {"gen_ai.request.model": model, "llm.job.state": state})

    async def _item(self, line: Line) -> batch_pb2.BatchItem | None:
        """Return the item of a line once its job has ended; None for one that never began and does not begin now."""
        if (job := line.job) is None:
            bad = bad_item(line)
            bad.end_time.GetCurrentTime()
            return bad
        if self._stopping:
            await _insistently(lambda: self._jobs.cancel(self._request, line.index))
        else:
            priority = activity.info().priority
            await _insistently(lambda: self._jobs.start(self._request, line.index, job, priority))
        item = await self._ended_item(line)
        if item is not None and self._stopping and item.state == llm_pb2.JOB_STATE_CANCELLED:
            item.state = self._request.otherwise
            item.error.CopyFrom(self._request.error)
        if item is None and not self._stopping:
            item = batch_pb2.BatchItem(index=line.index, custom_id=line.custom_id, state=llm_pb2.JOB_STATE_CANCELLED)
            item.error.CopyFrom(deleted())
            item.end_time.GetCurrentTime()
        return item

    async def _ended_item(self, line: Line) -> batch_pb2.BatchItem | None:
        """Return the item of a job that has ended; None if there is no such job."""
        for pause in (0,) if self._stopping else _LOOKS:
            await asyncio.sleep(pause)
            if (item := await _insistently(lambda: self._jobs.ended(self._request, line))) is not None:
                return item
        return None

    async def _flush(self) -> None:
        """Make the items that have ended durable, and report it. Waits for a store that is away."""
        writing = asyncio.create_task(self._write())
        try:
            while not writing.done():
                activity.heartbeat(self._chunk.result(self._running))
                await asyncio.wait({writing}, timeout=_FLUSH_SECONDS)
            writing.result()
        finally:
            writing.cancel()
        activity.heartbeat(self._chunk.result(self._running))

    async def _write(self) -> None:
        if not (ended := [*self._ended]):
            return
        segments = await patiently(lambda: self._segments.with_items([item for _, item in ended]))
        self._segments.keep(segments)
        self._chunk.add(ended, segments)
        del self._ended[: len(ended)]
        for _ in ended:
            # Until here its result is in memory.
            self._room.release()


async def _insistently(call: Callable[[], Awaitable[_T]]) -> _T:
    """Return what the call of Temporal returns. It is tried again for as long as Temporal is away."""
    while True:
        try:
            return await call()
        except (RPCError, KeysUnavailable) as error:
            _log.warning("a job of a batch cannot be reached, it is tried again: %r", error)
        await asyncio.sleep(_RETRY_SECONDS)
