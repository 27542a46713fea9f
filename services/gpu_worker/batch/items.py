"""Runs one item of a chunk, from its line to its BatchItem, whatever happens to it."""

import asyncio
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from google.rpc import status_pb2

from batches.chunk_lines import PlacedLine
from batches.lines import Line, LineReader
from batches.results import bad_item
from jobs.costs import cost_micros
from jobs.errors import (
    RULES,
    EngineFailed,
    JobError,
    RunTimeout,
    WorkerGone,
    WorkerLost,
    WorkerShutdown,
    to_status,
)
from jobs.field_rules import Violation
from jobs.options import DEFAULT_RUN_TIMEOUT, duration
from jobs.outcome import final_state
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch.chunk_log import ItemLog
from services.gpu_worker.batch.item_attempt import LOG_SECONDS, ItemAttempt, ItemWaits, Pace
from services.gpu_worker.batch.losses import Losses
from services.gpu_worker.batch.stops import Stop
from services.gpu_worker.engines.engine import Engine
from services.gpu_worker.report_throttle import ReportThrottle
from services.gpu_worker.seats import Seat
from services.gpu_worker.settings import GpuWorkerSettings
from services.gpu_worker.spans import ItemSpans

_log = logging.getLogger(__name__)
_MAX_FAILURES: Final = 3
_RETRY_SECONDS: Final = 2.0
"""Wait before the second attempt at an item, twice as long before the third, where a provider asks for no other."""


@dataclass(eq=False)
class RunningItem:
    """An item that runs."""

    place: int
    seat: Seat
    log: ItemLog
    losses: Losses
    wait: timedelta = timedelta()
    """The rest of its wait for its next attempt, from its begin at this worker on."""
    suspicion: ExitStack = field(default_factory=ExitStack)
    """Ends once nothing suspects the item of killing its worker."""
    attempt: ItemAttempt | None = None
    """The attempt that runs. None before the first one, and while the item waits for another."""
    task: "asyncio.Task[None] | None" = None
    hung: bool = False
    """Whether its attempt was ended because it made no progress."""
    suspected: bool = False


class ItemRunner:
    """Runs the items of one chunk."""

    def __init__(
        self,
        request: internal_pb2.ChunkRequest,
        number: int,
        jobs: RunLLMOnGPU,
        engine: Engine,
        settings: GpuWorkerSettings,
        worker: str,
        pace: Pace,
    ) -> None:
        """`number` is that of the attempt at the chunk. `pace` is the worker's."""
        self._request = request
        self._number = number
        self._jobs = jobs
        self._engine = engine
        self._settings = settings
        self._worker = worker
        self._pace = pace
        self._reader = LineReader(request.batch, is_planned=True)
        self._throttle = ReportThrottle(output_interval=LOG_SECONDS)
        self._spans = ItemSpans(jobs.tracer)
        self.stop: Stop | None = None
        """Set before the tasks of items are cancelled."""

    def parse(self, line: PlacedLine) -> Line:
        """Return the line of an item with its job, or as a bad one."""
        parsed = self._reader.read(line.raw)
        if parsed.job is not None and parsed.watch:
            return parsed.with_problem(Violation("watch", "is not supported in a chunk"))
        return parsed

    async def run(self, item: RunningItem, parsed: Line) -> batch_pb2.BatchItem:
        """Return the item once it has ended by itself, or by a stop with a status.

        Raises CancelledError for any other stop, WorkerGone when the engine is dead. The log then has what was made.
        """
        with self._spans.item(parsed.index):
            return await self._run(item, parsed)

    async def _run(self, item: RunningItem, parsed: Line) -> batch_pb2.BatchItem:
        if parsed.job is None:
            ended = bad_item(parsed)
            ended.end_time.GetCurrentTime()
            return ended
        request = internal_pb2.RunRequest(
            job=parsed.job,
            create_time=self._request.create_time,
            default_max_tokens=self._request.default_max_tokens,
            price=self._request.price if self._request.HasField("price") else None,
        )
        limit = parsed.job.timeouts.run.ToTimedelta() or DEFAULT_RUN_TIMEOUT
        if item.wait and (stop := await self._wait(item, item.wait)) is not None:
            attempt = self._new_attempt(item, request)
            await attempt.read_back()
            return self._stopped(parsed, attempt, stop)
        while True:
            attempt = item.attempt = self._new_attempt(item, request)
            item.log.engine_time = partial(_engine_time, attempt)
            reason, error = await self._run_attempt(item, attempt, limit.total_seconds())
            stop = self.stop
            if stop is not None and (error is stop.error or isinstance(error, WorkerGone)):
                return self._stopped(parsed, attempt, stop)
            if isinstance(error, WorkerGone) and not _is_given_up(error, attempt):
                raise error
            if error is None or not _is_tried_again(error, attempt):
                return self._ended(parsed, attempt, reason, error, None if error is None else to_status(error))
            # It has failed by itself, which ends the losses in a row.
            item.losses = item.losses._replace(in_vain=0)
            item.suspicion.close()
            if (stop := await self._wait(item, _retry_after(error, attempt.failures))) is not None:
                return self._stopped(parsed, attempt, stop)

    def _new_attempt(self, item: RunningItem, request: internal_pb2.RunRequest) -> ItemAttempt:
        attempt = ItemAttempt(
            request,
            self._number,
            datetime.now(UTC),
            str(item.place),
            self._worker,
            item.log,
            self._settings,
            self._throttle,
            losses=item.losses,
            pace=self._pace,
        )
        attempt.times.go_on_from(item.log.engine_time())
        return attempt

    async def _wait(self, item: RunningItem, wait: timedelta) -> Stop | None:
        """Wait for the next attempt at an item, without a seat. Return why the chunk ends before it, if it does."""
        # An item that waits makes no progress, and does not hang.
        item.attempt = None
        item.seat.free()
        try:
            with item.log.waiting():
                await asyncio.sleep(wait.total_seconds())
        except asyncio.CancelledError:
            if self.stop is None:
                raise
            return self.stop
        return None

    def _stopped(self, line: Line, attempt: ItemAttempt, stop: Stop) -> batch_pb2.BatchItem:
        """Return an item that ends with what it has generated. Raises CancelledError if the next attempt goes on."""
        if stop.status is None:
            raise asyncio.CancelledError
        return self._ended(line, attempt, None, stop.error, stop.status)

    async def _run_attempt(
        self, item: RunningItem, attempt: ItemAttempt, seconds: float
    ) -> "tuple[llm_pb2.FinishReason.ValueType | None, JobError | None]":
        """Run one attempt; return its finish reason or its error. What it made is published."""
        error: JobError
        try:
            async with asyncio.timeout(seconds) as limit:
                waits = ItemWaits(attempt, item.seat, limit)
                reason = await self._jobs.generate(attempt, waits, first=item.log.is_new)
            attempt.close(None)
        except asyncio.CancelledError:
            if item.hung and self.stop is None:
                item.hung = False
                if item.task is not None:
                    item.task.uncancel()
                error = EngineFailed("the engine has generated nothing for the item for too long")
            elif self.stop is None:
                error = WorkerShutdown("the chunk has ended")
                await self._close(attempt, error)
                raise
            else:
                error = self.stop.error
        except TimeoutError:
            error = RunTimeout("no attempt finished in time; raise timeouts.run or ask for less")
        except JobError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001  # the other items go on
            _log.exception("an item of the batch failed", extra={"place": item.place})
            error = EngineFailed(f"the worker failed on the item: {type(failure).__name__}")
        else:
            # Another item may kill the worker before this one is durable: it is not to blame for that.
            await attempt.end(reason)
            return reason, None
        await self._close(attempt, error)
        return None, error

    async def _close(self, attempt: ItemAttempt, error: JobError) -> None:
        """Publish how a failed attempt ended, and when the next one follows. Cancel what goes on at a provider."""
        attempt.close(error)
        again = _is_tried_again(error, attempt)
        wait = duration(_retry_after(error, attempt.failures)) if again else None
        await attempt.end(llm_pb2.FINISH_REASON_ERROR, wait)
        # The heartbeat of a chunk has no responses of providers, so the next attempt begins another one.
        await self._jobs.abandon(attempt)

    def _ended(
        self,
        line: Line,
        attempt: ItemAttempt,
        reason: "llm_pb2.FinishReason.ValueType | None",
        error: JobError | None,
        status: status_pb2.Status | None,
    ) -> batch_pb2.BatchItem:
        result = attempt.item_result(self._engine, error, reason)
        metadata = result.metadata
        self._pace.note(metadata)
        if self._request.HasField("price") and not metadata.HasField("cost_micros"):
            metadata.cost_micros = cost_micros(self._request.price, metadata.prompt_tokens, metadata.output_tokens)
        ended = batch_pb2.BatchItem(
            index=line.index, custom_id=line.custom_id, state=final_state(error), result=result, error=status
        )
        ended.end_time.GetCurrentTime()
        return ended


def _is_given_up(error: JobError, attempt: ItemAttempt) -> bool:
    """Return whether no attempt follows one that has ended with the error, because too many have failed."""
    return isinstance(error, WorkerLost) or attempt.failures >= _MAX_FAILURES


def _is_tried_again(error: JobError, attempt: ItemAttempt) -> bool:
    """Return whether another attempt follows one that has failed by itself."""
    return not (isinstance(error, WorkerGone) or _is_given_up(error, attempt)) and RULES[type(error)].retryable


def _retry_after(error: JobError, failures: int) -> timedelta:
    """Return the wait before another attempt, as that of a job: what a provider asks for comes first."""
    wait = error.retry_after
    return timedelta(seconds=_RETRY_SECONDS * 2 ** (failures - 1)) if wait is None else wait


def _engine_time(attempt: ItemAttempt) -> timedelta:
    return attempt.times.engine_time


def seat_request(chunk: internal_pb2.ChunkRequest, place: int) -> internal_pb2.RunRequest:
    """Return what orders an item among those who want a seat: one that has paused goes before one that begins."""
    request = internal_pb2.RunRequest(create_time=chunk.create_time)
    request.job.job_class = chunk.batch.job_class or common_pb2.JOB_CLASS_BACKGROUND
    request.create_time.FromNanoseconds(request.create_time.ToNanoseconds() + place)
    return request
