"""The client for asyncio."""

import asyncio
import copy
import os
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import grpc

from durable_llm._address import require_ports
from durable_llm._batch_stub import RetryingBatchStub
from durable_llm._batches import AsyncBatches
from durable_llm._file_stub import RetryingFileStub
from durable_llm._files import AsyncFiles
from durable_llm._job import AsyncJob
from durable_llm._model_calls import ModelCalls
from durable_llm._pipelines import AsyncPipelines
from durable_llm._requests import job_request, read_job
from durable_llm._retrying_stub import Metadata, RetryingStub
from durable_llm._schedules import AsyncSchedules
from durable_llm._services import SERVICE_OF
from durable_llm._streaming_stub import StreamingStub
from durable_llm.errors import DurableLLMError, InvalidRequest
from durable_llm.retry import RetryPolicy
from llm_pb import llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub

J = TypeVar("J")
ChannelOptions = Sequence[tuple[str, Any]]

ADDRESS_VARIABLE: Final = "LLM_ADDRESS"
DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
DEFAULT_TIMEOUT: Final = timedelta(seconds=30)
DEFAULT_IDLE_TIMEOUT: Final = timedelta(minutes=1)
DEFAULT_RETRY: Final = RetryPolicy()
_CHANNEL_OPTIONS: Final = (
    # A gateway that went away without closing its connection is noticed within 30 s. No gateway refuses so few pings.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A gateway restarts in seconds, so a connection that was refused is tried again soon.
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True)
class Outcome(Generic[J]):
    """How a job of `map` ended: with a result or with an error. J is AsyncJob or Job."""

    index: int
    """The job's place among the jobs of `map`, from 0."""
    job: J | None
    """The job. None when it was not accepted."""
    result: llm_pb2.JobResult | None
    """The result of a job that succeeded, otherwise None."""
    error: DurableLLMError | None
    """The error with which the job or a call failed. None when the job succeeded."""


class AsyncClient(ModelCalls):
    """A client of LlmService on one gRPC channel. Use it as a context manager, or close it."""

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
        """Connect to `address`, by default LLM_ADDRESS of the environment or 127.0.0.1:50051.

        `credentials` turn TLS on. `metadata` is sent with every call. `timeout` limits one try of a call that does not
        stream. `idle_timeout` limits the wait for a message of a stream, after which the stream counts as broken. It
        must be longer than the gateway's GATEWAY_KEEPALIVE (15 s by default). `retry` says how long calls and streams
        are tried again. `options` are more options of the gRPC channel, such as `("grpc.enable_http_proxy", 0)`. They
        override the client's own.

        Raises ValueError for an address with a port that does not exist.
        """
        address = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        require_ports(address)
        pairs: Metadata = tuple((metadata or {}).items())
        # gRPC takes the last one of options with the same name.
        all_options = (*_CHANNEL_OPTIONS, *options)
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, all_options)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, all_options)
        self._stub = RetryingStub(LlmServiceStub(self.channel), pairs, timeout, idle_timeout, retry)
        self._files = RetryingFileStub(FileServiceStub(self.channel), pairs, timeout, idle_timeout, retry)
        self._batches = RetryingBatchStub(BatchServiceStub(self.channel), pairs, timeout, idle_timeout, retry)
        self._pipelines = StreamingStub(PipelineServiceStub(self.channel), pairs, timeout, idle_timeout, retry)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel. Jobs continue."""
        await self.channel.close()

    def with_metadata(self, metadata: Mapping[str, str]) -> Self:
        """Return a client on the same channel that sends other metadata, for a server that calls for others."""
        client = copy.copy(self)
        pairs = tuple(metadata.items())
        for stub in ("_stub", "_files", "_batches", "_pipelines"):
            setattr(client, stub, getattr(self, stub).with_metadata(pairs))
        return client

    @property
    def files(self) -> AsyncFiles:
        """The files of the caller's tenant."""
        return AsyncFiles(self._files)

    @property
    def schedules(self) -> AsyncSchedules:
        """The calls about schedules."""
        return AsyncSchedules(self._stub.of(ScheduleServiceStub(self.channel)))

    @property
    def batches(self) -> AsyncBatches:
        """The batches of the caller's tenant."""
        return AsyncBatches(self._batches, self.files)

    @property
    def pipelines(self) -> AsyncPipelines:
        """The pipelines of the caller's tenant."""
        return AsyncPipelines(self._pipelines)

    async def call(self, method: str, request: Any) -> Any:
        """Return the response of a method of any service, by its name in the proto files and with its messages.

        It is for what the other methods do not offer. `method` has one request and one response. Raises ApiError.
        """
        services = {"BatchService": self._batches, "FileService": self._files, "PipelineService": self._pipelines}
        stub = services.get(SERVICE_OF[method].name, self._stub)
        if SERVICE_OF[method].name == "ScheduleService":
            stub = self._stub.of(ScheduleServiceStub(self.channel))
        return await stub.unary(method, request)

    async def submit(self, job: llm_pb2.JobRequest | None = None, /, **fields: Any) -> AsyncJob:
        """Start a job and return it. The job that was started before under the same user_id and request_id is returned.

        A job is a JobRequest, or its fields by name: `model="docstrings", prompt="def f(", params={"max_tokens": 9},
        labels={"team": "red"}`.
        A message may be a dict in OpenAI's form: `{"role": "user", "content": "Hello"}`. A job without a request_id
        gets a random one, so that a repeated try starts no second job. Raises ApiError, and ValueError or TypeError for
        a field that JobRequest does not have or that has another type.
        """
        request = llm_pb2.SubmitRequest(job=job_request(job, fields))
        response: llm_pb2.SubmitResponse = await self._stub.unary("Submit", request)
        return AsyncJob(self._stub, response.workflow_id)

    def job(self, workflow_id: str) -> AsyncJob:
        """Return a job that any client has submitted before. Makes no call."""
        return AsyncJob(self._stub, workflow_id)

    async def map(
        self, jobs: Iterable[llm_pb2.JobRequest | Mapping[str, Any]], *, concurrency: int = 16
    ) -> AsyncGenerator[Outcome[AsyncJob], None]:
        """Submit jobs, at most `concurrency` at a time, and yield the outcome of each, in the order in which they end.

        A job is a JobRequest or a dict of its fields. The next one is read when there is room for it, in the event
        loop: `jobs` must not block. A job that fails is an outcome and ends no other job. A dict that is no JobRequest
        fails with InvalidRequest. Leaving the loop early does not cancel the jobs that run. Raises ValueError for a
        `concurrency` below 1.
        """
        window = MapWindow(self, concurrency)
        try:
            for job in jobs:
                for outcome in await window.add(read_job(job)):
                    yield outcome
            while outcomes := await window.next():
                for outcome in outcomes:
                    yield outcome
        finally:
            await window.close()

    async def workers(self, model: str = "") -> Sequence[llm_pb2.WorkerInfo]:
        """Return the GPU workers that serve the model, or all, as they have last reported themselves.

        Raises ApiError: FeedUnavailable while the service gets no reports, MissingScope without `admin:workers`.
        """
        request = llm_pb2.ListWorkersRequest(model=model)
        response: llm_pb2.ListWorkersResponse = await self._stub.unary("ListWorkers", request)
        return response.workers

    async def quota(self) -> llm_pb2.GetQuotaResponse:
        """Return the quotas of the caller's tenant, and how much of them is in use. Raises ApiError."""
        response: llm_pb2.GetQuotaResponse = await self._stub.unary("GetQuota", llm_pb2.GetQuotaRequest())
        return response

    async def list(self, **filters: Any) -> AsyncGenerator[llm_pb2.JobSummary, None]:
        """Yield jobs, open jobs first, page after page. The filters are the fields of ListRequest.

        Raises ApiError, and ValueError for a filter that ListRequest does not have.
        """
        listed = self._stub.listed("List", llm_pb2.ListRequest(**filters), "jobs")
        async with aclosing(listed):
            async for summary in listed:
                yield summary

    async def delete_jobs(self, user_id: str, **filters: Any) -> llm_pb2.Deletion:
        """Delete the jobs of a user that match; return the deletion once it has ended.

        `filters` are the fields of DeleteJobsRequest.

        The deletion goes on if the caller does not wait for its end. Raises ApiError; ValueError for a filter that
        DeleteJobsRequest does not have.
        """
        request = llm_pb2.DeleteJobsRequest(user_id=user_id, **filters)
        response: llm_pb2.DeleteJobsResponse = await self._stub.unary("DeleteJobs", request)
        return await self._stub.deletion(response.deletion)

    async def delete_user(self, user_id: str) -> llm_pb2.Deletion:
        """Delete all that a user has; return the deletion once it has ended. Like delete_jobs()."""
        request = llm_pb2.DeleteUserRequest(user_id=user_id)
        response: llm_pb2.DeleteUserResponse = await self._stub.unary("DeleteUser", request)
        return await self._stub.deletion(response.deletion)


class MapWindow:
    """The jobs of one `map` that run at the same time."""

    def __init__(self, client: AsyncClient, size: int) -> None:
        """Raises ValueError for a `size`, the maximum number of jobs, below 1."""
        if size < 1:
            raise ValueError("concurrency must be at least 1")
        self._client = client
        self._size = size
        self._count = 0
        self._running: set[asyncio.Task[Outcome[AsyncJob]]] = set()

    async def add(self, job: llm_pb2.JobRequest | InvalidRequest) -> Sequence[Outcome[AsyncJob]]:
        """Start a job. Once there is room for another one, return the outcomes of the jobs that have ended."""
        self._running.add(asyncio.create_task(self._run(self._count, job)))
        self._count += 1
        return await self.next() if len(self._running) >= self._size else ()

    async def next(self) -> Sequence[Outcome[AsyncJob]]:
        """Wait until a job ends, and return the outcomes of all that have ended: none when no job runs."""
        if not self._running:
            return ()
        done, self._running = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        return [task.result() for task in done]

    async def close(self) -> None:
        """Stop waiting for the jobs that run. They continue."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self, index: int, request: llm_pb2.JobRequest | InvalidRequest) -> Outcome[AsyncJob]:
        job: AsyncJob | None = None
        try:
            if isinstance(request, InvalidRequest):
                raise request
            job = await self._client.submit(request)
            return Outcome(index, job, await job.result(), None)
        except DurableLLMError as error:
            return Outcome(index, job, None, error)
