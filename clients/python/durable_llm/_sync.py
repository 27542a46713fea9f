"""The client for code without asyncio: the same one, on an event loop in a thread of its own."""

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import grpc

from durable_llm._client import DEFAULT_RETRY, DEFAULT_TIMEOUT, AsyncClient, ChannelOptions, Outcome
from durable_llm._job import AsyncJob, Piece
from durable_llm.retry import RetryPolicy
from llm_pb import llm_pb2

T = TypeVar("T")
_END: Final = object()
_WAIT_SECONDS: Final = 1.0
"""How long Ctrl-C may wait for the thread that it interrupts."""
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
        retry: RetryPolicy = DEFAULT_RETRY,
        options: ChannelOptions = (),
    ) -> None:
        self._loop = _Loop()

        async def connect() -> AsyncClient:
            return AsyncClient(
                address, credentials=credentials, metadata=metadata, timeout=timeout, retry=retry, options=options
            )

        self._client = self._loop.run(connect())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """See AsyncClient.close. What waits in other threads ends with RuntimeError. Closing twice does nothing."""
        if not self._loop.closed:
            self._loop.run(self._client.close())
            self._loop.close()

    def submit(self, job: llm_pb2.JobRequest | None = None, /, **fields: Any) -> "Job":
        """See AsyncClient.submit."""
        return Job(self._loop, self._loop.run(self._client.submit(job, **fields)))

    def job(self, workflow_id: str) -> "Job":
        """See AsyncClient.job."""
        return Job(self._loop, self._client.job(workflow_id))

    def map(
        self, jobs: Iterable[llm_pb2.JobRequest | Mapping[str, Any]], *, concurrency: int = 16
    ) -> Generator[Outcome["Job"], None, None]:
        """See AsyncClient.map. The jobs are read in the client's own thread, and must not call the client."""
        with closing(self._loop.iterate(self._client.map(jobs, concurrency=concurrency))) as outcomes:
            for outcome in outcomes:
                job = Job(self._loop, outcome.job) if outcome.job is not None else None
                yield Outcome(outcome.index, job, outcome.result, outcome.error)

    def models(self) -> Sequence[llm_pb2.ModelInfo]:
        """See AsyncClient.models."""
        return self._loop.run(self._client.models())

    def list(self, **filters: Any) -> Generator[llm_pb2.JobSummary, None, None]:
        """See AsyncClient.list."""
        return self._loop.iterate(self._client.list(**filters))


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

    def cancel(self, reason: str = "") -> llm_pb2.JobStatus:
        """See AsyncJob.cancel."""
        return self._loop.run(self._job.cancel(reason))

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
        """Return what the coroutine returns. Ctrl-C cancels it, and is raised once the coroutine has ended.

        Raises RuntimeError when the loop is closed, and in the loop's own thread.
        """
        tasks: list[asyncio.Task[Any] | None] = []

        async def work() -> T:
            tasks.append(asyncio.current_task())
            return await coroutine

        async def cancel() -> None:
            for task in filter(None, tasks):
                task.cancel()

        try:
            self._require_other_thread()
            # Whatever begins before the closing is ended by it.
            with self._lock:
                self._require_open()
                future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        except RuntimeError:
            coroutine.close()
            raise
        try:
            # Not without a timeout: a signal that another thread takes, or that comes just before, wakes no wait.
            while not concurrent.futures.wait([future], _WAIT_SECONDS).done:
                pass
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError(_CLOSED) from None
        except BaseException:
            if not future.done():
                # Not future.cancel(), with which the future is done before the task is.
                asyncio.run_coroutine_threadsafe(cancel(), self._loop)
                concurrent.futures.wait([future])
            raise

    def iterate(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """Yield what the generator yields; close it when the caller leaves."""

        waiting: set[asyncio.Task[Any]] = set()

        async def following() -> Any:
            task = cast("asyncio.Task[Any]", asyncio.current_task())
            waiting.add(task)
            try:
                return await anext(items, _END)
            finally:
                waiting.remove(task)

        async def close() -> None:
            # Ctrl-C between the start of a wait and the wait itself leaves it running.
            for task in waiting:
                task.cancel()
            if waiting:
                await asyncio.wait(waiting)
            await items.aclose()

        try:
            while (item := self.run(following())) is not _END:
                yield item
        finally:
            if not self.closed:
                self.run(close())

    def close(self) -> None:
        """End the thread, and all that is under way in it."""
        with self._lock:
            self.closed = True
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError(_CLOSED)

    def _require_other_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("the jobs of map called its own client, which would wait for itself: list them first")
