"""The client for code without asyncio: AsyncClient on an event loop in a thread of its own."""

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc

from durable_llm._client import (
    DEFAULT_IDLE_TIMEOUT,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT,
    AsyncClient,
    ChannelOptions,
    MapWindow,
    Outcome,
)
from durable_llm._job import AsyncJob
from durable_llm._requests import job_request, read_job
from durable_llm._sync_batches import Batches
from durable_llm._sync_call import Call
from durable_llm._sync_files import Files
from durable_llm._sync_pipelines import Pipelines
from durable_llm._sync_schedules import Schedules
from durable_llm.output import Piece
from durable_llm.retry import RetryPolicy
from llm_pb import llm_pb2

T = TypeVar("T")
_END: Final = object()
_WAIT_SECONDS: Final = 1.0
"""Maximum time until Ctrl-C interrupts a wait, in seconds."""
_CLOSED: Final = "the client is closed"


class Client:
    """AsyncClient for code without asyncio. Safe to use from several threads. Use it as a context manager, or close it.

    Takes the arguments of AsyncClient.
    """

    def __init__(
        self,
        address: str = "",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        idle_timeout: timedelta = DEFAULT_IDLE_TIMEOUT,
        retry: RetryPolicy = DEFAULT_RETRY,
        options: ChannelOptions = (),
    ) -> None:
        self._loop = _Loop()

        async def connect() -> AsyncClient:
            return AsyncClient(
                address,
                credentials=credentials,
                metadata=metadata,
                timeout=timeout,
                idle_timeout=idle_timeout,
                retry=retry,
                options=options,
            )

        try:
            self._client = self._loop.run(connect())
        except BaseException:
            # Nobody has a client to close.
            self._loop.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """See AsyncClient.close. Waits of other threads end with RuntimeError. A second close does nothing."""
        if not self._loop.closed:
            try:
                self._loop.run(self._client.close())
            finally:
                self._loop.close()

    def submit(self, job: llm_pb2.JobRequest | None = None, /, **fields: Any) -> "Job":
        """See AsyncClient.submit."""
        # Read in this thread: messages may come from an iterable that waits, and would hold up the loop's.
        request = job_request(job, fields)
        return Job(self._loop, self._loop.run(self._client.submit(request)))

    def job(self, workflow_id: str) -> "Job":
        """See AsyncClient.job."""
        return Job(self._loop, self._client.job(workflow_id))

    def map(
        self, jobs: Iterable[llm_pb2.JobRequest | Mapping[str, Any]], *, concurrency: int = 16
    ) -> Generator[Outcome["Job"], None, None]:
        """See AsyncClient.map. The jobs are read in the caller's thread: `jobs` may block and may call the client."""
        window = MapWindow(self._client, concurrency)
        try:
            for job in jobs:
                yield from self._own(self._loop.run(window.add(read_job(job))))
            while outcomes := self._loop.run(window.next()):
                yield from self._own(outcomes)
        finally:
            if not self._loop.closed:
                self._loop.run(window.close())

    def _own(self, outcomes: Iterable[Outcome[AsyncJob]]) -> Generator[Outcome["Job"], None, None]:
        for outcome in outcomes:
            job = Job(self._loop, outcome.job) if outcome.job is not None else None
            yield Outcome(outcome.index, job, outcome.result, outcome.error)

    @property
    def batches(self) -> Batches:
        """See AsyncClient.batches."""
        return Batches(self._loop, self._client.batches)

    @property
    def pipelines(self) -> Pipelines:
        """See AsyncClient.pipelines."""
        return Pipelines(self._loop, self._client.pipelines)

    @property
    def files(self) -> Files:
        """See AsyncClient.files."""
        return Files(self._loop, self._client.files)

    @property
    def schedules(self) -> Schedules:
        """See AsyncClient.schedules."""
        return Schedules(self._loop, self._client.schedules)

    def models(self) -> Sequence[llm_pb2.ModelInfo]:
        """See AsyncClient.models."""
        return self._loop.run(self._client.models())

    def trained_models(self) -> Sequence[llm_pb2.TrainedModel]:
        """See AsyncClient.trained_models."""
        return self._loop.run(self._client.trained_models())

    def set_model_alias(self, model: str, alias: str, version: int) -> llm_pb2.TrainedModel:
        """See AsyncClient.set_model_alias."""
        return self._loop.run(self._client.set_model_alias(model, alias, version))

    def delete_model_version(self, model: str, version: int) -> llm_pb2.TrainedModel:
        """See AsyncClient.delete_model_version."""
        return self._loop.run(self._client.delete_model_version(model, version))

    def workers(self, model: str = "") -> Sequence[llm_pb2.WorkerInfo]:
        """See AsyncClient.workers."""
        return self._loop.run(self._client.workers(model))

    def quota(self) -> llm_pb2.GetQuotaResponse:
        """See AsyncClient.quota."""
        return self._loop.run(self._client.quota())

    def list(self, **filters: Any) -> Generator[llm_pb2.JobSummary, None, None]:
        """See AsyncClient.list."""
        return self._loop.iterate(self._client.list(**filters))

    def delete_jobs(self, user_id: str, **filters: Any) -> llm_pb2.Deletion:
        """See AsyncClient.delete_jobs."""
        return self._loop.run(self._client.delete_jobs(user_id, **filters))

    def delete_user(self, user_id: str) -> llm_pb2.Deletion:
        """See AsyncClient.delete_user."""
        return self._loop.run(self._client.delete_user(user_id))


class Job:
    """AsyncJob for code without asyncio."""

    def __init__(self, loop: "_Loop", job: AsyncJob) -> None:
        self._loop = loop
        self._job = job
        self.workflow_id = job.workflow_id
        """See AsyncJob."""

    def get(self) -> llm_pb2.GetStatusResponse:
        """See AsyncJob.get."""
        return self._loop.run(self._job.get())

    def get_job(self) -> llm_pb2.GetJobResponse:
        """See AsyncJob.get_job."""
        return self._loop.run(self._job.get_job())

    def cancel(self, reason: str = "") -> llm_pb2.JobStatus:
        """See AsyncJob.cancel."""
        return self._loop.run(self._job.cancel(reason))

    def delete(self) -> llm_pb2.Deletion:
        """See AsyncJob.delete."""
        return self._loop.run(self._job.delete())

    def deliveries(self) -> Sequence[llm_pb2.Delivery]:
        """See AsyncJob.deliveries."""
        return self._loop.run(self._job.deliveries())

    def redeliver(self, *delivery_ids: str) -> Sequence[llm_pb2.Delivery]:
        """See AsyncJob.redeliver."""
        return self._loop.run(self._job.redeliver(*delivery_ids))

    def watch(self, resume_token: str = "") -> Generator[llm_pb2.StreamStatusResponse, None, None]:
        """See AsyncJob.watch."""
        return self._loop.iterate(self._job.watch(resume_token))

    def stream(self, resume_token: str = "") -> Generator[Piece, None, None]:
        """See AsyncJob.stream."""
        return self._loop.iterate(self._job.stream(resume_token))

    def result(self, timeout: timedelta | None = None) -> llm_pb2.JobResult:
        """See AsyncJob.result."""
        return self._loop.run(self._job.result(timeout))


class _Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()

        async def until_closed() -> None:
            started.set_result(asyncio.get_running_loop())
            await self._closing.wait()

        self._closing = asyncio.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=lambda: asyncio.run(until_closed()), name="durable-llm", daemon=True)
        self._thread.start()
        self._loop = started.result()
        self.closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and return its result. Ctrl-C cancels it, and is raised once it has ended.

        Raises RuntimeError when the loop is closed, and in the loop's own thread, which would wait for itself.
        """
        call = Call(coroutine)
        try:
            self._require_other_thread()
            # close() ends every call that begins before it.
            with self._lock:
                self._require_open()
                self._loop.call_soon_threadsafe(call.start)
            # The timeout is for a signal that another thread takes, or that comes just before: it does not wake a wait.
            while not call.ended.wait(_WAIT_SECONDS):
                pass
        except BaseException:
            # Ctrl-C may interrupt any line, also one before the call begins.
            self._cancel(call)
            raise
        try:
            return call.result()
        except asyncio.CancelledError:
            raise RuntimeError(_CLOSED) from None

    def _cancel(self, call: "Call[Any]") -> None:
        """Cancel a call, and wait until it has ended."""
        inside = threading.current_thread() is self._thread
        with self._lock:
            cancels = not (inside or self.closed)
            if cancels:
                self._loop.call_soon_threadsafe(call.cancel)
        if cancels:
            call.ended.wait()
            return
        if not inside:
            self._thread.join()
        call.cancel()

    def iterate(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """Yield the items of an asynchronous generator. Close it when the caller leaves."""

        async def following() -> Any:
            return await anext(items, _END)

        async def close() -> None:
            await items.aclose()

        try:
            while (item := self.run(following())) is not _END:
                yield item
        finally:
            if not self.closed:
                self.run(close())

    def close(self) -> None:
        """End the thread and all calls that run in it."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError(_CLOSED)

    def _require_other_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("the client was called in its own thread, which would wait for itself")
