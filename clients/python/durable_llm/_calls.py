"""Calls of the service, repeated while what they fail for may pass."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

import grpc

from durable_llm._failures import from_call
from durable_llm.errors import ApiError, Unavailable
from durable_llm.retry import RetryPolicy
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]

_log: Final = logging.getLogger("durable_llm")

_FIRST_LOOK: Final = timedelta(milliseconds=200)
_LAST_LOOK: Final = timedelta(seconds=5)
"""Waits before a client asks how a deletion stands: the first and the longest one."""
FINAL_STATES: Final = frozenset(
    {
        llm_pb2.JOB_STATE_SUCCEEDED,
        llm_pb2.JOB_STATE_FAILED,
        llm_pb2.JOB_STATE_CANCELLED,
        llm_pb2.JOB_STATE_TIMED_OUT,
    }
)


class Calls:
    """The calls of one client. All of them are safe to repeat."""

    def __init__(self, stub: LlmServiceStub, metadata: Metadata, timeout: timedelta, retry: RetryPolicy) -> None:
        """`timeout` is that of one try of a call that does not stream."""
        self._stub = stub
        self._metadata = metadata
        self._timeout = timeout
        self._retry = retry
        self._answered = False

    async def unary(self, method: str, request: Any) -> Any:
        """Return the answer of a method. Raises ApiError."""
        call: Callable[..., Awaitable[Any]] = getattr(self._stub, method)
        tries = _Tries()
        while True:
            try:
                answer = await call(request, timeout=self._timeout.total_seconds(), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                await self._pause(from_call(error), tries, f"calling {method} again")
            else:
                self._answered = True
                return answer

    async def deletion(self, deletion: llm_pb2.Deletion) -> llm_pb2.Deletion:
        """Return a deletion once it has ended. Raises ApiError."""
        wait = _FIRST_LOOK
        while deletion.state == llm_pb2.DELETION_STATE_IN_PROGRESS:
            await asyncio.sleep(wait.total_seconds())
            wait = min(2 * wait, _LAST_LOOK)
            request = llm_pb2.GetDeletionRequest(deletion_id=deletion.deletion_id)
            deletion = (await self.unary("GetDeletion", request)).deletion
        return deletion

    async def watch(self, workflow_id: str, resume_token: str) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield a job's messages to its end. A stream that breaks is opened again where it broke. Raises ApiError."""
        tries = _Tries()
        place = _Place(resume_token)
        ended = False
        while True:
            call = self._stub.StreamStatus(place.request(workflow_id), metadata=self._metadata)
            try:
                async for message in call:
                    self._answered = True
                    tries = _Tries()
                    place.move(message)
                    ended = is_last(message)
                    yield message
                broken: ApiError = Unavailable("the stream ended before the job did", grpc.StatusCode.UNAVAILABLE)
            except grpc.aio.AioRpcError as error:
                broken = from_call(error)
            finally:
                call.cancel()
            if ended:
                return
            await self._pause(broken, tries, f"going on at {place}")

    async def _pause(self, error: ApiError, tries: "_Tries", then: str) -> None:
        tries.failures += 1
        silence = timedelta(seconds=time.monotonic() - tries.since)
        wait = self._retry.backoff(error, tries.failures, silence, answered=self._answered)
        if wait is None:
            raise error
        _log.info("%s; %s in %.1f s", error, then, wait.total_seconds())
        await asyncio.sleep(wait.total_seconds())


def is_last(message: llm_pb2.StreamStatusResponse) -> bool:
    """Return whether a stream has nothing more to say. Output may follow a first message with a final status."""
    final = message.HasField("status") and message.status.state in FINAL_STATES
    return final and (message.HasField("result") or not message.HasField("delta"))


class _Place:
    """A reader's place in a job's output."""

    def __init__(self, resume_token: str) -> None:
        self._resume_token = resume_token
        self._offset: int | None = None if resume_token else 0
        """None while only the gateway knows it, from the token."""

    def __str__(self) -> str:
        return f"byte {self._offset}" if self._offset is not None else "its resume_token"

    def request(self, workflow_id: str) -> llm_pb2.StreamStatusRequest:
        """Return the request that continues here. A gateway of an earlier version reads the offset alone."""
        return llm_pb2.StreamStatusRequest(
            workflow_id=workflow_id, output_offset=self._offset or 0, resume_token=self._resume_token
        )

    def move(self, message: llm_pb2.StreamStatusResponse) -> None:
        """Move past a message of the stream that continues here."""
        if message.resume_token:
            self._resume_token, self._offset = message.resume_token, message.next_offset
        elif message.HasField("delta"):
            # A gateway of an earlier version does not read the token. Without an offset it begins at 0. The token is
            # dropped, because it no longer belongs to the offset and the next gateway would refuse it.
            message.delta.rewind |= self._offset is None
            self._resume_token, self._offset = "", message.next_offset


class _Tries:
    """The tries since the service last answered."""

    def __init__(self) -> None:
        self.failures = 0
        self.since = time.monotonic()
