"""One job, as a client holds it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta

from durable_llm._calls import Calls, is_last
from durable_llm._failures import from_outcome
from llm_pb import llm_pb2


@dataclass(frozen=True)
class Piece:
    """A piece of a job's output."""

    text: str
    """The text: whole characters."""
    offset: int
    """Where it begins in the output, in UTF-8 bytes."""
    rewind: bool
    """Whether the job had to start over from the offset: all output from there on is void, then comes the text."""
    resume_token: str
    """Continues the stream after this piece: see AsyncJob.stream. Empty from a gateway of an earlier version."""


class AsyncJob:
    """A job of the service. Made by AsyncClient.submit, or by AsyncClient.job for one that is there already."""

    def __init__(self, calls: Calls, workflow_id: str) -> None:
        self._calls = calls
        self._outcome: llm_pb2.GetStatusResponse | None = None
        self.workflow_id = workflow_id
        """Its id, under which any client finds it again."""

    async def get(self) -> llm_pb2.GetStatusResponse:
        """Return the job's status now, and its result once there is one. Raises ApiError."""
        request = llm_pb2.GetStatusRequest(workflow_id=self.workflow_id)
        response: llm_pb2.GetStatusResponse = await self._calls.unary("GetStatus", request)
        return response

    async def cancel(self, reason: str = "") -> llm_pb2.JobStatus:
        """Ask the job to stop; return its status. A job that has ended stays as it is. Raises ApiError."""
        request = llm_pb2.CancelRequest(workflow_id=self.workflow_id, reason=reason)
        response: llm_pb2.CancelResponse = await self._calls.unary("Cancel", request)
        return response.status

    async def delete(self) -> llm_pb2.Deletion:
        """Delete the job with all that it has produced; return the deletion once it has ended.

        The deletion goes on if the caller does not wait for its end. Raises ApiError.
        """
        request = llm_pb2.DeleteJobRequest(workflow_id=self.workflow_id)
        response: llm_pb2.DeleteJobResponse = await self._calls.unary("DeleteJob", request)
        return await self._calls.deletion(response.deletion)

    async def watch(self, resume_token: str = "") -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield all that StreamStatus says of the job, to its end, whatever gateway or connection breaks meanwhile.

        How the job ends is not raised. Raises ApiError.
        """
        async with aclosing(self._calls.watch(self.workflow_id, resume_token)) as messages:
            async for message in messages:
                if is_last(message):
                    self._outcome = llm_pb2.GetStatusResponse(status=message.status, result=message.result)
                    if message.output_omitted:
                        self._outcome = await self.get()
                yield message

    async def stream(self, resume_token: str = "") -> AsyncGenerator[Piece, None]:
        """Yield the job's output as it is generated, each byte once.

        `resume_token` is that of the last piece that the caller holds; without one the output comes from its start.
        Raises JobError at the end of a job that did not succeed, ApiError.
        """
        async with aclosing(self.watch(resume_token)) as messages:
            async for message in messages:
                if message.HasField("delta"):
                    delta = message.delta
                    yield Piece(delta.text, delta.offset, delta.rewind, message.resume_token)
        self._succeeded()

    async def result(self, timeout: timedelta | None = None) -> llm_pb2.JobResult:  # noqa: ASYNC109  # as asyncio's
        """Return the result once the job has ended.

        Raises JobError for a job that did not succeed, TimeoutError when it has not ended in time (it goes on),
        ApiError.
        """
        async with asyncio.timeout(timeout.total_seconds() if timeout is not None else None):
            if self._outcome is None:
                async with aclosing(self.watch()) as messages:
                    async for _ in messages:
                        pass
        return self._succeeded()

    def _succeeded(self) -> llm_pb2.JobResult:
        if self._outcome is None:
            raise RuntimeError("the stream ended before the job did")
        error = from_outcome(self._outcome.status, self._outcome.result)
        if error is not None:
            raise error
        return self._outcome.result
