"""RunLLMOnGPU: one attempt at one job, from Temporal's task to the engine and back.

A cancel of the activity has one of three causes. If the user asked for it, the partial output is the result. If the
worker stops, the workflow hands the job over to another worker. If Temporal gave the attempt up, its result is ignored.

An attempt that has to wait for a seat goes on here as soon as there is one: see services.gpu_worker.seats. After too
long a wait it is handed over as well, for any worker to continue.

A hung engine must look dead. An attempt without progress for too long sends no more heartbeats. If no other attempt has
progressed meanwhile, it is the engine that hangs, and its worker must end.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import timedelta
from typing import Final, NoReturn

from opentelemetry.metrics import Meter
from opentelemetry.trace import Tracer
from temporalio import activity
from temporalio.exceptions import ApplicationError

from feed.feed import Feed
from jobs import names
from jobs.application_errors import to_attempt_error
from jobs.errors import RULES, Cancelled, EngineDead, JobError, UnknownModel, WorkerShutdown
from jobs.heartbeat import before_handover, from_details, to_details
from jobs.ids import tenant_of
from jobs.rules import require_valid
from jobs.stages import DONE, LOADING, PREFILL
from llm_pb import common_pb2, internal_pb2, llm_pb2
from services.gpu_worker import spans
from services.gpu_worker.answer_cache import AnswerCache, Flight
from services.gpu_worker.attempt import Attempt
from services.gpu_worker.engines.engine import Abandons, CannotContinue, Engine
from services.gpu_worker.giving_up import why_given_up
from services.gpu_worker.metrics import WorkerMetrics
from services.gpu_worker.output_files import PARTIAL_PATIENCE, OutputFiles
from services.gpu_worker.prompt_files import PromptFiles
from services.gpu_worker.report_throttle import ReportThrottle
from services.gpu_worker.seat_waits import NoSeat, SeatWaits, Waits
from services.gpu_worker.seats import Seat, Seats
from services.gpu_worker.settings import GpuWorkerSettings
from services.gpu_worker.spans import generation_span
from store.store import Store

_log = logging.getLogger(__name__)
_NO_TIMEOUT: Final = timedelta(hours=1)
"""Where Temporal has none."""


class RunLLMOnGPU:
    """The activity, bound to this process's engine."""

    def __init__(
        self,
        engine: Engine,
        loaded: "asyncio.Task[None]",
        feed: Feed,
        settings: GpuWorkerSettings,
        worker: str,
        meter: Meter,
        tracer: Tracer,
        store: Store | None = None,
        cache: AnswerCache | None = None,
    ) -> None:
        """`loaded` is the task that starts the engine; jobs taken before it is done wait for it.

        Without a `cache` each job generates.
        """
        self.seats = Seats(settings.max_concurrent, settings.background_seats)
        self.metrics = WorkerMetrics(meter, engine, settings.model, self.seats)
        self.tracer = tracer
        self._engine = engine
        self._loaded = loaded
        self._feed = feed
        self._settings = settings
        self._worker = worker
        self._files = OutputFiles(store)
        self._prompts = PromptFiles(store)
        self._cache = cache or AnswerCache(None, None, meter)
        self._throttle = ReportThrottle(settings.output_records_per_second)
        self._moved_at = 0.0
        self._hung = asyncio.Event()

    async def wait_until_engine_fails(self) -> NoReturn:
        """Wait until the engine cannot load, dies or hangs, and raise EngineDead then."""
        limit = self._settings.load_timeout
        try:
            async with asyncio.timeout(limit.total_seconds()):
                await asyncio.shield(self._loaded)
        except TimeoutError:
            raise EngineDead(f"the model has not loaded within {limit} (GPU_WORKER_LOAD_TIMEOUT)") from None
        _log.info("%s on %s: ready", self._settings.model, self._engine.gpu.name)
        ends = [asyncio.create_task(event.wait()) for event in (self._engine.dead, self._hung)]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        raise EngineDead("the engine hangs" if self._hung.is_set() else "the engine died")

    @activity.defn(name=names.ACTIVITY_RUN)
    async def __call__(self, request: internal_pb2.RunRequest) -> llm_pb2.JobResult:
        """Run the model and return the job's result, or a partial one if the user cancelled.

        Raises ApplicationError with a reason of jobs.errors, and the partial JobResult as its detail.
        """
        info = activity.info()
        key = request.feed_key or info.workflow_run_id or info.activity_id
        number = request.earlier_attempts + info.attempt
        spans.describe_attempt(number, request.handovers, self._worker)
        _log.info("attempt started", extra={"attempt": number, "model": request.job.model})
        feed = self._feed.of_tenant(tenant_of(info.workflow_id or ""))
        attempt = Attempt(request, number, info.started_time, key, self._worker, feed, self._settings, self._throttle)
        if (heartbeat := from_details(info.heartbeat_details)).HasField("metadata"):
            attempt.restore(heartbeat)
        elif request.HasField("queue_time"):
            attempt.restore(before_handover(request))
        attempt.max_output_bytes = self._files.limit(request.max_output_bytes)
        # The heartbeats go on while the output is written.
        async with self._beating(attempt):
            return await self._run(attempt, request)

    async def _run(self, attempt: Attempt, request: internal_pb2.RunRequest) -> llm_pb2.JobResult:
        info = activity.info()
        job_id = info.workflow_id or ""
        file: common_pb2.FileRef | None = None
        reason: llm_pb2.FinishReason.ValueType = llm_pb2.FINISH_REASON_ERROR
        try:
            with self.seats.attempt(request) as seat:
                waits = SeatWaits(attempt, seat, request, self._settings.pause_wait)
                first = info.attempt == 1 and request.handovers == 0
                if first:
                    self.metrics.started(attempt.times.queue_time.ToTimedelta())
                reason = await self.generate(attempt, waits, first=first)
            file = await self._files.save(attempt, job_id)
            attempt.close(None)
        except asyncio.CancelledError:
            details = activity.cancellation_details()
            if details is not None and details.cancel_requested:
                reason = llm_pb2.FINISH_REASON_CANCELLED
                await self.abandon(attempt)
                attempt.close(Cancelled("cancelled on request"))
                # Without the file the output is cut.
                with suppress(TimeoutError):
                    file = await self._files.save(attempt, job_id, PARTIAL_PATIENCE)
            elif details is not None and details.worker_shutdown:
                # The attempt counts for a job that the engine hung on, because the job may be what makes engines hang.
                hung = self._hung.is_set() and attempt.watchdog.hangs
                why = EngineDead("the engine hangs") if hung else WorkerShutdown("the worker was asked to stop")
                raise await self._failure(why, attempt) from None
            else:
                spans.describe_giving_up()
                attempt.close(why_given_up(info))
                raise
        except NoSeat as why:
            attempt.pause()
            # The workflow tells it from a worker that stops by the attempt's end.
            raise await self._partial(WorkerShutdown(str(why)), attempt) from why
        except JobError as error:
            if not RULES[type(error)].retryable:
                await self.abandon(attempt)
            raise await self._failure(error, attempt) from error
        finally:
            spans.describe_end(reason)
            _log.info("attempt ended", extra={"attempt": attempt.number, **attempt.figures(reason)})
            await attempt.end(reason)
        return attempt.result(self._engine, reason, file)

    async def generate(self, attempt: Attempt, waits: Waits, *, first: bool) -> "llm_pb2.FinishReason.ValueType":
        """Run an attempt in the engine to its finish reason. `first`: there is no earlier output to continue.

        Raises JobError, and what `waits` raises. An attempt of a batch's item runs here, too.
        """
        job = attempt.job
        # This comes before anything that can fail, because a failure carries the output of earlier attempts.
        continues = await attempt.start(first=first)
        # Rules that a later version added are skipped, so that jobs that were accepted before continue.
        require_valid(job, strict=False)
        if job.model != self._settings.model:
            raise UnknownModel(f"model {job.model!r} is not served by this worker, {self._settings.model!r} is")
        if self._settings.is_trained and tenant_of(activity.info().workflow_id or "") != self._settings.model_tenant:
            raise UnknownModel(f"model {job.model!r} is another tenant's")
        if not self._loaded.done():
            await attempt.enter(LOADING)
        try:
            await asyncio.shield(self._loaded)
        except EngineDead as error:
            # The worker's engine is dead, but the job has not been tried.
            raise WorkerShutdown(f"the worker cannot load its model: {error}") from error
        if job.HasField("prompt_file"):
            # An item of a batch has one. While the store is away others use it.
            waits.seat.free()
            await attempt.enter(LOADING)
            job.prompt = await self._prompts.read(job.prompt_file, activity.info().workflow_id or "")
            job.ClearField("prompt_file")
        if attempt.rewinds:
            self.metrics.rewound()
        async with self._cache.flight(attempt, activity.info().workflow_id or "") as flight:
            while True:
                if (cached := await flight.landed()) is not None:
                    return cached
                await waits.take_seat()
                if not await flight.take_off():
                    waits.seat.free()
                    continue
                await attempt.enter(PREFILL)
                try:
                    reason = await self._run_engine(attempt, waits.seat, flight)
                except CannotContinue as why:
                    _log.info("the output so far cannot be continued: %s", why)
                    attempt.start_over()
                    self.metrics.rewound()
                    continues = False
                    continue
                if continues:
                    self.metrics.continued()
                    continues = False
                if reason is not None:
                    await flight.keep(reason)
                    return reason
                self.metrics.paused()
                await flight.release()
                waits.pause()

    async def _run_engine(
        self, attempt: Attempt, seat: Seat, flight: Flight
    ) -> "llm_pb2.FinishReason.ValueType | None":
        """Generate; return the finish reason, or None if the seat is to be freed before the end."""
        engine, capture = self._engine, self._settings.capture_content
        tenant = tenant_of(activity.info().workflow_id or "")
        attempt.require_budget()
        with (
            generation_span(self.tracer, engine.name, attempt.job, capture) as span,
            self.metrics.generation(attempt.job) as record,
            attempt.times.generating(),
        ):
            async with aclosing(engine.generate(attempt.generation(tenant))) as outputs:
                try:
                    while (output := await seat.next(outputs)) is not None:
                        span.add(output)
                        record(output)
                        self._moved_at = time.monotonic()
                        await attempt.add(output)
                        flight.note(output)
                        attempt.require_budget(engine.context_tokens, output.finish_reason)
                        if output.finish_reason is not None:
                            await attempt.enter(DONE)
                            return output.finish_reason
                finally:
                    await attempt.publish()
        return None

    @asynccontextmanager
    async def _beating(self, attempt: Attempt) -> AsyncIterator[None]:
        """Send heartbeats while the context is open and the attempt makes progress."""
        timeout = activity.info().heartbeat_timeout or _NO_TIMEOUT

        async def pause() -> None:
            # A third of the timeout allows some heartbeats to be lost or late, however many attempts run.
            seconds = min(self._throttle.seconds(self._settings.heartbeat_interval), timeout.total_seconds() / 3)
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await attempt.beat_now.wait()
            attempt.beat_now.clear()

        async def beat() -> None:
            # The start reports as much as a first heartbeat would, so a short job needs none.
            await pause()
            hung = False
            # The check must fail twice in a row, because a process that was suspended must not blame the engine.
            while not (hung and attempt.watchdog.hangs):
                hung = attempt.watchdog.hangs
                activity.heartbeat(*to_details(attempt.heartbeat()))
                await pause()
            _log.error("no progress in %s for too long: no more heartbeats", attempt.watchdog.stage)
            self.blame_engine(attempt)

        beating = asyncio.create_task(beat())
        try:
            with self._throttle.attempt():
                yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    def blame_engine(self, attempt: Attempt) -> bool:
        """End the worker if no attempt has progressed since the last progress of one that hangs; return whether."""
        if self._moved_at <= attempt.watchdog.moved_at:
            self._hung.set()
        return self._hung.is_set()

    async def abandon(self, attempt: Attempt) -> None:
        """Cancel what goes on at a provider, because no attempt continues it."""
        if attempt.provider_response.response_id and isinstance(self._engine, Abandons):
            await self._engine.abandon(attempt.provider_response)

    async def _failure(self, error: JobError, attempt: Attempt) -> ApplicationError:
        """Close the attempt; return the error for Temporal, with the attempt's partial result."""
        spans.describe_error(error)
        attempt.close(error)
        return await self._partial(error, attempt)

    async def _partial(self, error: JobError, attempt: Attempt) -> ApplicationError:
        """Return the error for Temporal, with the partial result of an attempt that is closed."""
        try:
            file = await self._files.save(attempt, activity.info().workflow_id or "", PARTIAL_PATIENCE)
        except TimeoutError:
            if not RULES[type(error)].handed_over:
                # The workflow reads the whole output back from the feed.
                return to_attempt_error(error)
            # The feed stays open for the next attempt, which has the whole output from there.
            file = None
        return to_attempt_error(error, attempt.result(self._engine, llm_pb2.FINISH_REASON_ERROR, file))
