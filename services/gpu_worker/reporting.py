"""The worker's reports about itself, which every gateway gets: see ListWorkers. They hold nothing of any job."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Protocol

from feed.worker_reports import WorkerReports
from jobs.options import duration
from llm_pb import internal_pb2, llm_pb2
from runtime.health import own_version
from services.gpu_worker.engines.engine import Engine
from services.gpu_worker.metrics import WorkerMetrics
from services.gpu_worker.seats import Seats
from services.gpu_worker.settings import GpuWorkerSettings, queues_of

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 1.0
"""Wait after a report that could not be sent."""
_RATE_SECONDS: Final = 10.0
"""Time over which tokens are counted for their rate."""


class Attempts(Protocol):
    """What runs the worker's jobs."""

    metrics: WorkerMetrics
    seats: Seats


class Rate:
    """The recent rate of a number that only grows."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()

    def per_second(self, number: int) -> float:
        """Note the number and return its growth a second since the oldest note of the last 10 s, or the last note."""
        now = self._clock()
        while len(self._samples) > 1 and self._samples[1][0] <= now - _RATE_SECONDS:
            self._samples.popleft()
        self._samples.append((now, number))
        began, before = self._samples[0]
        return (number - before) / (now - began) if now > began else 0.0


class Reporter:
    """Creates the worker's reports and publishes them."""

    def __init__(
        self,
        reports: WorkerReports,
        attempts: Attempts,
        engine: Engine,
        loading: "asyncio.Task[None]",
        settings: GpuWorkerSettings,
        name: str,
    ) -> None:
        """`loading` is the task that starts the engine. `name` is the worker's identity."""
        self._reports = reports
        self._attempts = attempts
        self._engine = engine
        self._loading = loading
        self._interval = settings.report_interval
        self._rate = Rate()
        self._changed = asyncio.Event()
        self._draining = False
        self._about = llm_pb2.WorkerInfo(
            worker=name,
            version=own_version(),
            model=settings.model,
            engine=settings.engine,
            task_queues=queues_of(settings),
            seats=settings.max_concurrent,
        )
        self._about.start_time.GetCurrentTime()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Report that the worker takes jobs while the context is open, and at once that it drains after that."""
        try:
            yield
        finally:
            self._draining = True
            self._changed.set()

    def info(self) -> llm_pb2.WorkerInfo:
        """Return the worker as it is now."""
        info, load = llm_pb2.WorkerInfo(), self._engine.load()
        info.CopyFrom(self._about)
        info.state = llm_pb2.WORKER_STATE_LOADING
        info.seats_in_use = self._attempts.seats.in_use
        info.running_sequences, info.waiting_sequences = load.running, load.waiting
        info.tokens_per_second = self._rate.per_second(self._attempts.metrics.tokens_made)
        if self._loading.done() and not self._loading.cancelled() and self._loading.exception() is None:
            info.state = llm_pb2.WORKER_STATE_SERVING
            info.kv_cache_usage = load.kv_cache_usage
            info.gpu.CopyFrom(self._engine.gpu)
        if self._draining:
            info.state = llm_pb2.WORKER_STATE_DRAINING
        return info

    async def keep_reporting(self) -> None:
        """Report at intervals, and whenever the worker begins to drain."""
        while True:
            self._changed.clear()
            sent = False
            try:
                sent = await self._reports.publish_report(self._report(self.info()))
            except Exception:  # noqa: BLE001  # reports are worth less than jobs
                # A worker that cannot be described goes on with its jobs.
                _log.exception("the worker could not be reported; it is tried again")
            interval = self._interval.total_seconds()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval if sent else min(interval, _RETRY_SECONDS)):
                    await self._changed.wait()

    async def end(self) -> None:
        """Report that the worker has ended. The engine may be dead, so it is not asked anything."""
        await self._reports.publish_report(self._report(self._about, ended=True))

    def _report(self, info: llm_pb2.WorkerInfo, *, ended: bool = False) -> internal_pb2.WorkerReport:
        return internal_pb2.WorkerReport(worker=info, interval=duration(self._interval), ended=ended)


@asynccontextmanager
async def reporting(
    reports: WorkerReports,
    attempts: Attempts,
    engine: Engine,
    loading: "asyncio.Task[None]",
    settings: GpuWorkerSettings,
    name: str,
) -> AsyncIterator[Reporter]:
    """Report the worker while the context is open, and that it has ended as the context closes."""
    reporter = Reporter(reports, attempts, engine, loading, settings, name)
    keeping = asyncio.create_task(reporter.keep_reporting())
    try:
        yield reporter
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await reporter.end()
