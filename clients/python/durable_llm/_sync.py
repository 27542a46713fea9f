"""The client for code without asyncio: the same one, on an event loop in a thread of its own."""

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

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

    def delete_jobs(self, user_id: str, **filters: Any) -> llm_pb2.Deletion:
        """See AsyncClient.delete_jobs."""
        return self._loop.run(self._client.delete_jobs(user_id, **filters))


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

    def delete(self) -> llm_pb2.Deletion:
        """See AsyncJob.delete."""
        return self._loop.run(self._job.delete())

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
        call = _Call(coroutine)
        try:
            self._require_other_thread()
            # Whatever begins before the closing is ended by it.
            with self._lock:
                self._require_open()
                self._loop.call_soon_threadsafe(call.start)
            # Not without a timeout: a signal that another thread takes, or that comes just before, wakes no wait.
            while not call.ended.wait(_WAIT_SECONDS):
                pass
        except BaseException:
            # It may not have begun: Ctrl-C comes at any moment.
            self._cancel(call)
            raise
        try:
            return call.result()
        except asyncio.CancelledError:
            raise RuntimeError(_CLOSED) from None

    def _cancel(self, call: "_Call[Any]") -> None:
        """Cancel a call; return once it has ended."""
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
        """Yield what the generator yields; close it when the caller leaves."""

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


class _Call(Generic[T]):
    """A coroutine that the thread of a loop runs for another one."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.ended = threading.Event()
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None

    def start(self) -> None:
        """Run the coroutine. In the loop's thread."""
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        """End the coroutine, also before its start. In the loop's thread, or once that has ended."""
        if self._task is None:
            self._coroutine.close()
            self.ended.set()
        elif not self._task.done():
            self._task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            # Else asyncio would log it where Ctrl-C leaves nobody to ask for the result.
            task.exception()
        self.ended.set()

    def result(self) -> T:
        """Return what the coroutine has returned. Raises CancelledError for one that was cancelled."""
        assert self._task is not None  # noqa: S101  # it has ended
        return self._task.result()
