"""How tests create and watch jobs, and read the details of errors.

Watchers use the generated stub: a stream that breaks fails the test, where durable_llm would reconnect.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from llm_pb import llm_pb2, llm_pb2_grpc

_T = TypeVar("_T")
PATIENCE_SECONDS = 180
"""Deadline of a stream. A busy machine makes a job many times slower, which says nothing of the code."""

_ids = itertools.count(1)


def new_job(prompt: str = "Say something.", **changes: Any) -> llm_pb2.JobRequest:
    """Return a job with a new request id. `params` may be a dict."""
    number = next(_ids)
    values = {"user_id": f"user-{number}", "request_id": f"req-{number}", "model": "docstrings", **changes}
    if "messages" not in values:
        values["prompt"] = prompt
    return llm_pb2.JobRequest(**values)


@dataclass
class Seen:
    """Everything that a watcher has received."""

    messages: list[llm_pb2.StreamStatusResponse] = field(default_factory=list)
    output: bytes = b""
    logprobs: list[llm_pb2.TokenLogprobs] = field(default_factory=list)
    rewinds: int = 0
    next_offset: int = 0
    resume_token: str = ""

    @property
    def states(self) -> list[str]:
        """The states in order, without repeats."""
        names = [
            llm_pb2.JobState.Name(message.status.state).removeprefix("JOB_STATE_")
            for message in self.messages
            if message.HasField("status")
        ]
        return [name for name, _ in itertools.groupby(names)]

    @property
    def final(self) -> llm_pb2.StreamStatusResponse:
        return self.messages[-1]

    def add(self, message: llm_pb2.StreamStatusResponse) -> None:
        self.messages.append(message)
        if message.HasField("delta"):
            delta = message.delta
            assert delta.offset <= len(self.output), "the deltas have a gap"
            assert delta.rewind == (delta.offset < len(self.output)), "rewind contradicts the offset"
            self.rewinds += delta.rewind
            self.output = self.output[: delta.offset] + delta.text.encode()
            if delta.rewind:
                self.logprobs = [place for place in self.logprobs if place.offset < delta.offset]
            self.logprobs += delta.logprobs
        self.next_offset = message.next_offset
        self.resume_token = message.resume_token or self.resume_token


def assert_not_tried_again(seen: Seen) -> None:
    """Assert that no attempt followed the one that ended with the job's final error."""
    error = seen.final.status.error
    goes_on = (llm_pb2.JOB_STATE_QUEUED, llm_pb2.JOB_STATE_RUNNING)
    assert not [m for m in seen.messages if m.status.state in goes_on and m.status.error.details == error.details]


async def watch(stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str) -> Seen:
    """Watch a job from the start of its output to its end."""
    seen = Seen()
    async for message in stub.StreamStatus(
        llm_pb2.StreamStatusRequest(workflow_id=workflow_id), timeout=PATIENCE_SECONDS
    ):
        seen.add(message)
    return seen


async def run_job(stub: llm_pb2_grpc.LlmServiceStub, job: llm_pb2.JobRequest) -> Seen:
    """Submit a job and watch it to its end."""
    response = await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE_SECONDS)
    return await watch(stub, response.workflow_id)


async def until_message(
    stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str, condition: Callable[[llm_pb2.StreamStatusResponse], bool]
) -> None:
    """Return once a message of the job's stream meets the condition. Raise AssertionError at the end of the job."""
    last = None
    async for message in stub.StreamStatus(
        llm_pb2.StreamStatusRequest(workflow_id=workflow_id), timeout=PATIENCE_SECONDS
    ):
        if condition(message):
            return
        last = message
    raise AssertionError(f"the job ended before a message met the condition, with {last}")


async def until_answered(call: Callable[[], Awaitable[_T]]) -> _T:
    """Return the answer of a call. It is made again while it is UNAVAILABLE.

    Temporal may be too busy to answer, the first call may go to a gateway that was killed, a file may be being removed.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.1)


async def until_output(stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str) -> None:
    """Return once the job has output."""
    await until_message(stub, workflow_id, lambda message: message.HasField("delta"))


def details_of(error: grpc.RpcError) -> dict[str, Any]:
    """Return the google.rpc details of a failed call by type name: BadRequest, ErrorInfo, RetryInfo."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    return unpack(status)


def unpack(status: status_pb2.Status) -> dict[str, Any]:
    """Return the details of a status by type name."""
    found = {}
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(detail)
        found[type(detail).__name__] = detail
    return found


def webhook(url: str) -> list[llm_pb2.NotifyTarget]:
    """Return JobRequest.notify for one webhook."""
    return [llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=url))]
