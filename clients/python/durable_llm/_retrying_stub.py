"""A stub with retries: a call that fails for a reason that passes is repeated."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Self

import grpc

from durable_llm._statuses import from_call
from durable_llm.errors import ApiError, Unavailable
from durable_llm.retry import RetryPolicy
from llm_pb import llm_pb2

Metadata = tuple[tuple[str, str], ...]

_log: Final = logging.getLogger("durable_llm")

FINAL_STATES: Final = frozenset(
    {
        llm_pb2.JOB_STATE_SUCCEEDED,
        llm_pb2.JOB_STATE_FAILED,
        llm_pb2.JOB_STATE_CANCELLED,
        llm_pb2.JOB_STATE_TIMED_OUT,
    }
)
"""The states in which a job stays."""
_FIRST_LOOK: Final = timedelta(milliseconds=200)
_LAST_LOOK: Final = timedelta(seconds=5)
"""Waits before a client asks how a deletion stands: the first and the longest one."""
RESET: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
"""What gRPC makes of a stream that is reset without a status."""


class RetryingStub:
    """A stub that repeats failed calls. All calls of LlmService are safe to repeat."""

    def __init__(
        self, stub: Any, metadata: Metadata, timeout: timedelta, idle_timeout: timedelta, retry: RetryPolicy
    ) -> None:
        """`stub` is the generated one of a service. Send `metadata` with every call.

        `timeout` limits one try of a call that does not stream, `idle_timeout` the wait for a message of a stream.
        """
        self._stub = stub
        self._metadata = metadata
        self._timeout = timeout
        self._idle_timeout = idle_timeout
        self._retry = retry
        self._answered = False

    def with_metadata(self, metadata: Metadata) -> Self:
        """Return a stub on the same channel that sends other metadata."""
        return type(self)(self._stub, metadata, self._timeout, self._idle_timeout, self._retry)

    def of(self, stub: Any) -> "RetryingStub":
        """Return one of another service, with a stub on the same channel. Its calls have one response each."""
        return RetryingStub(stub, self._metadata, self._timeout, self._idle_timeout, self._retry)

    async def unary(self, method: str, request: Any) -> Any:
        """Return the response of a method. Raises ApiError."""
        call: Callable[..., Awaitable[Any]] = getattr(self._stub, method)
        silence = Silence()
        while True:
            try:
                with silence.growing():
                    response = await call(request, timeout=self._timeout.total_seconds(), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                await self.back_off(from_call(error), silence, f"calling {method} again")
            else:
                self._answered = True
                return response

    async def listed(self, method: str, request: Any, field: str) -> AsyncGenerator[Any, None]:
        """Yield what the pages of a list hold in a field, page after page. Raises ApiError."""
        while True:
            response = await self.unary(method, request)
            for item in getattr(response, field):
                yield item
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def deletion(self, deletion: llm_pb2.Deletion) -> llm_pb2.Deletion:
        """Return a deletion once it has ended. Raises ApiError."""
        wait = _FIRST_LOOK
        while deletion.state == llm_pb2.DELETION_STATE_IN_PROGRESS:
            await asyncio.sleep(wait.total_seconds())
            wait = min(2 * wait, _LAST_LOOK)
            request = llm_pb2.GetDeletionRequest(deletion_id=deletion.deletion_id)
            deletion = (await self.unary("GetDeletion", request)).deletion
        return deletion

    async def watch(
        self, workflow_id: str, resume_token: str, output_offset: int = 0
    ) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield the messages of a job's StreamStatus to its end. A stream that breaks continues where it broke.

        Raises ApiError.
        """
        silence = Silence()
        place = _Place(resume_token, output_offset)
        status: llm_pb2.JobStatus | None = None
        ended = False
        while True:
            call = self._stub.StreamStatus(place.request(workflow_id), metadata=self._metadata)
            messages = aiter(call)
            first = True
            try:
                while True:
                    message = await self._next(messages, silence)
                    self._answered = True
                    # The first message of a stream repeats the status that the last stream has brought.
                    if not first or message.HasField("delta") or message.status != status:
                        silence = Silence()
                    if message.HasField("status"):
                        status = message.status
                    first = False
                    place.move(message)
                    ended = is_last(message)
                    yield message
            except ApiError as error:
                broken = error
            finally:
                call.cancel()
            if ended:
                return
            await self.back_off(broken, silence, f"going on at {place}")

    async def _next(
        self, messages: AsyncIterator[llm_pb2.StreamStatusResponse], silence: "Silence"
    ) -> llm_pb2.StreamStatusResponse:
        """Return a stream's next message. Raises ApiError when the stream breaks, falls silent or ends."""
        seconds = self._idle_timeout.total_seconds()
        try:
            with silence.growing():
                async with asyncio.timeout(seconds):
                    return await anext(messages)
        except grpc.aio.AioRpcError as error:
            failure = from_call(error)
            # A proxy resets the stream when its gateway dies. The gateway's own errors have a reason.
            if failure.code in RESET and not failure.reason:
                raise Unavailable(str(failure), grpc.StatusCode.UNAVAILABLE) from error
            raise failure from error
        except TimeoutError:
            raise Unavailable(f"no message has come for {seconds:g} s", grpc.StatusCode.UNAVAILABLE) from None
        except StopAsyncIteration:
            raise Unavailable("the stream ended before the job did", grpc.StatusCode.UNAVAILABLE) from None

    async def back_off(self, error: ApiError, silence: "Silence", then: str) -> None:
        """Wait until the next try. Raises the error when the policy allows no further try."""
        silence.failures += 1
        wait = self._retry.backoff(error, silence.failures, silence.duration, answered=self._answered)
        if wait is None:
            raise error
        _log.info("%s; %s in %.1f s", error, then, wait.total_seconds())
        with silence.growing():
            await asyncio.sleep(wait.total_seconds())


def is_last(message: llm_pb2.StreamStatusResponse) -> bool:
    """Return whether a message is the last one of a job. Output may follow a first message with a final status."""
    final = message.HasField("status") and message.status.state in FINAL_STATES
    return final and (message.HasField("result") or not message.HasField("delta"))


class _Place:
    """A reader's place in a job's output."""

    def __init__(self, resume_token: str, offset: int) -> None:
        self._resume_token = resume_token
        self._offset: int | None = None if resume_token else offset
        """Number of bytes before the place. None while only the gateway knows it, from the token."""

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


class Silence:
    """The time since the service last brought something new. Pauses of the caller between two messages do not count."""

    def __init__(self) -> None:
        self.failures = 0
        """Number of tries that have failed."""
        self._seconds = 0.0

    @property
    def duration(self) -> timedelta:
        """The time that the client has waited."""
        return timedelta(seconds=self._seconds)

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Count the time for which the context is open."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - began
