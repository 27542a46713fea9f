"""The client for asyncio."""

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import grpc

from durable_llm._calls import Calls, Metadata
from durable_llm._job import AsyncJob
from durable_llm.errors import DurableLLMError, InvalidRequest
from durable_llm.retry import RetryPolicy
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

J = TypeVar("J")
ChannelOptions = Sequence[tuple[str, Any]]

ADDRESS_VARIABLE: Final = "LLM_ADDRESS"
DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
DEFAULT_TIMEOUT: Final = timedelta(seconds=30)
DEFAULT_RETRY: Final = RetryPolicy()
_CHANNEL_OPTIONS: Final = (
    # Finds out within half a minute that a gateway went away without a word. No gateway refuses so few pings.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A connection that was refused is tried again soon: a gateway restarts in seconds.
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
_ROLES: Final = {"system": "ROLE_SYSTEM", "user": "ROLE_USER", "assistant": "ROLE_ASSISTANT"}


@dataclass(frozen=True)
class Outcome(Generic[J]):
    """How one of the jobs of a client's map ended: with a result, or with an error. J is AsyncJob or Job."""

    index: int
    """Which job it was, from 0."""
    job: J | None
    """The job. None when it was not accepted."""
    result: llm_pb2.JobResult | None
    """The result of a job that succeeded."""
    error: DurableLLMError | None
    """What the job, or a call, failed with."""


class AsyncClient:
    """A client of LlmService on one channel. Use it as a context manager, or close it."""

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
        """Connect to `address`, by default LLM_ADDRESS of the environment or 127.0.0.1:50051.

        `credentials` make the connection TLS. `metadata` goes along with every call. `timeout` is that of one try of a
        call that does not stream. `retry` says how long calls and streams are tried again.
        `options` are more options of the gRPC channel, such as `("grpc.enable_http_proxy", 0)`. They override the
        client's own.
        """
        address = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        # Of a name that is there twice gRPC takes the last.
        all_options = (*_CHANNEL_OPTIONS, *options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, all_options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, all_options)
        pairs: Metadata = tuple((metadata or {}).items())
        self._calls = Calls(LlmServiceStub(self._channel), pairs, timeout, retry)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel. Jobs go on."""
        await self._channel.close()

    async def submit(self, job: llm_pb2.JobRequest | None = None, /, **fields: Any) -> AsyncJob:
        """Start a job, or find the equal one that was started under its user_id and request_id; return it.

        The job is a JobRequest, or its fields by name: `model="docstrings", prompt="def f(", params={"max_tokens": 9}`.
        Messages may be dicts as OpenAI has them: `{"role": "user", "content": "Hello"}`. Without a request_id the job
        gets a random one, so that a repeated try finds the first. Raises ApiError; ValueError or TypeError for
        fields that a JobRequest does not have, or not of this type.
        """
        request = llm_pb2.SubmitRequest(job=_job_of(job, fields))
        response: llm_pb2.SubmitResponse = await self._calls.unary("Submit", request)
        return AsyncJob(self._calls, response.workflow_id)

    def job(self, workflow_id: str) -> AsyncJob:
        """Return a job that was submitted before, by any client. Asks nothing of the service."""
        return AsyncJob(self._calls, workflow_id)

    async def map(
        self, jobs: Iterable[llm_pb2.JobRequest | Mapping[str, Any]], *, concurrency: int = 16
    ) -> AsyncGenerator[Outcome[AsyncJob], None]:
        """Submit jobs, at most `concurrency` at a time, and yield how each ended, in the order in which they end.

        A job is a JobRequest or a dict of its fields. What fails is an outcome, too: it ends no other job. A dict that
        is no JobRequest fails with InvalidRequest. Leaving the loop early leaves the jobs that run; they are not
        cancelled.
        """
        if concurrency < 1:
            raise ValueError("concurrency must be at least 1")
        numbered = enumerate(jobs)
        running: set[asyncio.Task[Outcome[AsyncJob]]] = set()
        try:
            while True:
                while len(running) < concurrency and (item := next(numbered, None)) is not None:
                    running.add(asyncio.create_task(self._outcome(*item)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _outcome(self, index: int, given: llm_pb2.JobRequest | Mapping[str, Any]) -> Outcome[AsyncJob]:
        job: AsyncJob | None = None
        try:
            job = await self.submit(_given_job(given))
            return Outcome(index, job, await job.result(), None)
        except DurableLLMError as error:
            return Outcome(index, job, None, error)

    async def models(self) -> Sequence[llm_pb2.ModelInfo]:
        """Return the models that a job may name. Raises ApiError."""
        response: llm_pb2.ListModelsResponse = await self._calls.unary("ListModels", llm_pb2.ListModelsRequest())
        return response.models

    async def list(self, **filters: Any) -> AsyncGenerator[llm_pb2.JobSummary, None]:
        """Yield jobs, those still open first, page after page. Filters are the fields of ListRequest.

        Raises ApiError; ValueError for a filter that ListRequest does not have.
        """
        request = llm_pb2.ListRequest(**filters)
        while True:
            response: llm_pb2.ListResponse = await self._calls.unary("List", request)
            for summary in response.jobs:
                yield summary
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def delete_jobs(self, user_id: str, **filters: Any) -> llm_pb2.Deletion:
        """Delete the jobs of a user that match; return the deletion once it has ended.

        `filters` are the fields of DeleteJobsRequest.

        The deletion goes on if the caller does not wait for its end. Raises ApiError; ValueError for a filter that
        DeleteJobsRequest does not have.
        """
        request = llm_pb2.DeleteJobsRequest(user_id=user_id, **filters)
        response: llm_pb2.DeleteJobsResponse = await self._calls.unary("DeleteJobs", request)
        return await self._calls.deletion(response.deletion)


def _given_job(given: llm_pb2.JobRequest | Mapping[str, Any]) -> llm_pb2.JobRequest:
    """Return the job that the fields make. Raises InvalidRequest, as the service does for what it is sent."""
    if isinstance(given, llm_pb2.JobRequest):
        return given
    try:
        return _job_of(None, dict(given))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"this is no JobRequest: {error}", grpc.StatusCode.INVALID_ARGUMENT) from error


def _job_of(job: llm_pb2.JobRequest | None, fields: Mapping[str, Any]) -> llm_pb2.JobRequest:
    values = dict(fields)
    if messages := values.get("messages"):
        values["messages"] = [_message_of(message) for message in messages]
    request = llm_pb2.JobRequest(**values)
    if job is not None:
        base = llm_pb2.JobRequest()
        base.CopyFrom(job)
        base.MergeFrom(request)
        request = base
    if not request.request_id:
        request.request_id = uuid.uuid4().hex
    return request


def _message_of(message: Any) -> Any:
    if isinstance(message, Mapping) and message.get("role") in _ROLES:
        return {**message, "role": _ROLES[message["role"]]}
    return message
