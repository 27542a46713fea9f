"""One attempt at a chunk: begins its items as seats become free, makes what they return durable, and reports it.

The attempt ends in one of these ways:

    every item is durable          the result says so
    a cancel, the window's end     what runs ends with what it has generated; the result lacks what never began
    the grant is spent             the result says what is needed; what runs goes on with that, or ends if none is left
    the worker stops, its engine   what runs is in the log, and the next attempt goes on with it
    is dead, it has no seat
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from temporalio import activity

from batches.chunk import Chunk, usage_of
from batches.chunk_lines import ChunkLines
from batches.grants import Grant
from batches.lines import Line
from batches.patience import patiently
from batches.segment_writer import SegmentWriter
from jobs.errors import EngineDead, JobError, WorkerShutdown
from llm_pb import batch_pb2, internal_pb2
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch.chunk_log import ChunkLog
from services.gpu_worker.batch.hand_over import HandOver
from services.gpu_worker.batch.item_attempt import LOG_SECONDS
from services.gpu_worker.batch.items import ItemRunner, RunningItem, seat_request
from services.gpu_worker.batch.metrics import ChunkMetrics
from services.gpu_worker.batch.stops import Stop, first_of, stop_expired, stop_for_grant, stop_of
from services.gpu_worker.seats import Demand, Seat
from services.gpu_worker.settings import GpuWorkerSettings

_FLUSH_SECONDS: Final = 2.0
"""Time after which results are written to the store, and named in a heartbeat. A heartbeat costs Temporal as much as
several items, and results are to be read 5 s after they were generated."""
_MAX_WAITING_BYTES: Final = 16 * 1024 * 1024
"""Size of results that wait for a store that is away, from which on no further item begins."""
_LAST_FLUSH: Final = timedelta(seconds=5)
"""Maximum time to write results before a hand-over. What is not written is in the log."""


class ChunkRun:
    """One attempt at one chunk."""

    def __init__(
        self,
        request: internal_pb2.ChunkRequest,
        chunk: Chunk,
        runner: ItemRunner,
        log: ChunkLog,
        segments: SegmentWriter,
        lines: ChunkLines,
        jobs: RunLLMOnGPU,
        grant: Grant,
        settings: GpuWorkerSettings,
        metrics: ChunkMetrics,
        suspects: asyncio.Lock,
    ) -> None:
        """`suspects` is held by the one suspect that the worker runs: see losses.py."""
        self.chunk = chunk
        self._grant = grant
        self._request = request
        self._runner = runner
        self._log = log
        self._segments = segments
        self._lines = lines
        self._jobs = jobs
        self._metrics = metrics
        self._suspects = suspects
        self._most = min(request.max_concurrent or settings.max_concurrent, settings.max_concurrent)
        self._room = asyncio.Semaphore(self._most)
        self._hand_over = HandOver(settings.pause_wait.total_seconds())
        self._heartbeat_seconds = settings.heartbeat_interval.total_seconds()
        self._running: set[RunningItem] = set()
        self._asking: Seat | None = None
        self._ended: list[tuple[RunningItem, batch_pb2.BatchItem]] = []
        self._waiting_bytes = 0
        self._flushed = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._left = 0
        self._reported_at = 0.0
        self._demand = Demand()
        self._working: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @property
    def stop(self) -> Stop | None:
        """Why the attempt ended before its items; None if they ended, or the grant is spent."""
        return self._runner.stop

    async def run(self, *, first: bool) -> None:
        """Run the items until the attempt ends: see `chunk` and `stop`. `first`: there was no attempt before.

        Raises CancelledError when Temporal has given the attempt up.
        """
        todo = self.chunk.todo()
        self._left = len(todo)
        self._demand.items = min(self._left, self._most)
        with self._jobs.seats.chunk(self._demand), self._beside():
            working = self._working = asyncio.create_task(self._work(todo, first=first))
            try:
                left = self._request.expire_time.ToDatetime(UTC) - datetime.now(UTC)
                limited = self._request.HasField("expire_time")
                await asyncio.wait({working}, timeout=max(left.total_seconds(), 0.0) if limited else None)
                if not working.done():
                    self._runner.stop = self.stop or stop_expired()
            except asyncio.CancelledError:
                self._note_cancel()
            working.cancel()
            await self._settled(working)
            if not working.cancelled() and (failure := working.exception()) is not None and self.stop is None:
                self._failure = self._failure or first_of(failure)
            if self._failure is not None:
                raise self._failure
            finishing = asyncio.create_task(self._finish())
            await self._settled(finishing)
            await finishing

    async def _settled(self, task: "asyncio.Task[None]") -> None:
        """Wait for the end of a task, whatever cancel comes meanwhile, unless Temporal has given the attempt up."""
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                self._note_cancel()
                if self._failure is not None:
                    task.cancel()

    def _note_cancel(self) -> None:
        stop = stop_of(activity.cancellation_details())
        if stop is None:
            self._failure = asyncio.CancelledError()
        else:
            self._runner.stop = self.stop or stop

    async def _work(self, todo: list[int], *, first: bool) -> None:
        async with asyncio.TaskGroup() as group:
            beginning = group.create_task(self._begin(group, todo, first=first))
            draining = asyncio.create_task(activity.wait_for_worker_shutdown())
            # What runs has the time of the grace to end.
            draining.add_done_callback(lambda done: done.cancelled() or beginning.cancel())
            try:
                await asyncio.wait({beginning})
            finally:
                draining.cancel()
        if self._left and self.stop is None and self._grant.needed is None:
            self._runner.stop = Stop(WorkerShutdown("the worker was asked to stop"))

    async def _begin(self, group: asyncio.TaskGroup, todo: list[int], *, first: bool) -> None:
        """Begin each item when there is room for it."""
        if not first:
            await self._log.take_over(set(todo))
            # The others do not wait for them.
            todo.sort(key=lambda place: self._log.losses(place).in_vain > 0)
        plan = await self._lines.plan()
        async with aclosing(self._lines.read(plan, todo)) as lines:
            async for placed in lines:
                line = self._runner.parse(placed)
                if line.job is not None and not await self._grant.reserve(placed.place, line.job):
                    return
                await self._room.acquire()
                while self._waiting_bytes > _MAX_WAITING_BYTES:
                    self._flushed.clear()
                    await self._flushed.wait()
                with ExitStack() as stack:
                    suspicion = stack.enter_context(ExitStack())
                    if (losses := self._log.losses(placed.place)).in_vain:
                        await self._suspects.acquire()
                        suspicion.callback(self._suspects.release)
                    seat = stack.enter_context(
                        self._jobs.seats.attempt(seat_request(self._request, placed.place), item=True)
                    )
                    rest = self._log.rest_of_wait(placed.place)
                    if not rest and not seat.ask():
                        self._asking = seat
                        try:
                            await seat.wait(None)
                        finally:
                            self._asking = None
                    item = RunningItem(placed.place, seat, self._log.item(placed.place), losses, rest, suspicion)
                    self._running.add(item)
                    item.task = group.create_task(self._run_item(item, line))
                    item.task.add_done_callback(partial(self._end_item, item, stack.pop_all()))

    async def _run_item(self, item: RunningItem, line: Line) -> None:
        try:
            ended = await self._runner.run(item, line)
        except JobError as error:
            # The engine is dead, for all items.
            self._runner.stop = self.stop or Stop(error)
            raise
        self._grant.settle(item.place, ended, usage_of(ended))
        self._ended.append((item, ended))
        self._waiting_bytes += ended.ByteSize()
        self._left -= 1
        self._metrics.ended(ended.state)

    def _end_item(self, item: RunningItem, seat: ExitStack, _: object) -> None:
        # A task that is cancelled before its first step runs no code of its own.
        self._running.remove(item)
        self._grant.release(item.place)
        self._room.release()
        # Another chunk may come for the seats that this one does not need any more.
        self._demand.items = min(self._left, self._most)
        seat.close()

    async def flush(self) -> None:
        """Make the items that have ended durable. Waits for a store that is away."""
        async with self._flushing:
            if not (ended := [*self._ended]):
                return
            began = time.monotonic()
            segments = await patiently(lambda: self._segments.with_items([item for _, item in ended]))
            self._segments.keep(segments)
            self.chunk.add([(item.place, result) for item, result in ended], segments)
            del self._ended[: len(ended)]
            for running, _ in ended:
                running.log.forget()
            self._waiting_bytes -= sum(item.ByteSize() for _, item in ended)
            self._flushed.set()
            self._metrics.flushed(time.monotonic() - began)
        self._report()

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        activity.heartbeat(self.chunk.result(len(self._running)))

    async def _finish(self) -> None:
        """Make durable what can be, and leave the rest in the log."""
        flushing = asyncio.create_task(self.flush())
        leaving = asyncio.create_task(activity.wait_for_worker_shutdown())
        try:
            await asyncio.wait({flushing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({flushing}, timeout=_LAST_FLUSH.total_seconds())
            if flushing.done():
                await flushing
            else:
                self._runner.stop = Stop(WorkerShutdown("the worker was asked to stop, and the store is away"))
        finally:
            leaving.cancel()
            flushing.cancel()
        if self._grant.needed is not None:
            self.chunk.need(self._grant.needed)
        if self.stop is None or self.stop.status is not None:
            await self._log.remove()
        else:
            await self._log.flush()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Write the log, flush and send heartbeats while the context is open."""
        tasks = [asyncio.create_task(keep()) for keep in (self._keep_logging, self._keep_flushing, self._beat)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def _keep_logging(self) -> None:
        while True:
            await asyncio.sleep(LOG_SECONDS)
            await self._log.flush()
            if self._grant.is_over({item.place: item.log.engine_time() for item in self._running}):
                self._halt(stop_for_grant(is_last=self._grant.is_last))
            leaving = activity.is_worker_shutdown()
            if (stop := self._hand_over.due(self._running, self._asking, is_leaving=leaving)) is not None:
                self._halt(stop)

    async def _keep_flushing(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            try:
                await self.flush()
            except Exception as error:  # noqa: BLE001  # it ends the attempt
                self._failure = error
                if self._working is not None:
                    self._working.cancel()
                return

    async def _beat(self) -> None:
        timeout = activity.info().heartbeat_timeout or timedelta(seconds=30)
        interval = min(self._heartbeat_seconds, timeout.total_seconds() / 3)
        while True:
            if time.monotonic() - self._reported_at > min(_FLUSH_SECONDS, timeout.total_seconds() / 3) - interval / 2:
                self._report()
            await asyncio.sleep(interval)
            self._end_hung_items()

    def _end_hung_items(self) -> None:
        """End attempts without progress. The check must fail twice, because a process may have been suspended."""
        for item in [*self._running]:
            attempt, suspected = item.attempt, item.suspected
            item.suspected = attempt is not None and attempt.watchdog.hangs
            if attempt is None or not (item.suspected and suspected) or item.hung:
                continue
            if self._jobs.blame_engine(attempt):
                self._halt(Stop(EngineDead("the engine hangs")))
            elif item.task is not None:
                item.hung = True
                item.task.cancel()

    def _halt(self, stop: Stop) -> None:
        self._runner.stop = self.stop or stop
        if self._working is not None:
            self._working.cancel()
