"""A job of the service, for asyncio."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import timedelta

from durable_llm._error import DurableLLMError
from durable_llm._retrying_stub import RetryingStub, is_last
from durable_llm._statuses import from_outcome
from durable_llm.output import Output, Piece
from llm_pb import common_pb2, llm_pb2


class AsyncJob:
    """A job of the service. AsyncClient.submit and AsyncClient.job return it."""

    def __init__(self, stub: RetryingStub, workflow_id: str) -> None:
        self._stub = stub
        self._outcome: llm_pb2.GetStatusResponse | None = None
        self.workflow_id = workflow_id
        """The job's id, by which any client finds it again."""

    async def get(self) -> llm_pb2.GetStatusResponse:
        """Return the job's present status, and its result once it has ended. Raises ApiError."""
        request = llm_pb2.GetStatusRequest(workflow_id=self.workflow_id)
        response: llm_pb2.GetStatusResponse = await self._stub.unary("GetStatus", request)
        return response

    async def get_job(self) -> llm_pb2.GetJobResponse:
        """Return the job as it was submitted, its present status, and its result once it has ended. Raises ApiError."""
        request = llm_pb2.GetJobRequest(workflow_id=self.workflow_id)
        response: llm_pb2.GetJobResponse = await self._stub.unary("GetJob", request)
        return response

    async def cancel(self, reason: str = "") -> llm_pb2.JobStatus:
        """Request that the job stops, and return its status. A job that has ended stays as it is. Raises ApiError."""
        request = llm_pb2.CancelRequest(workflow_id=self.workflow_id, reason=reason)
        response: llm_pb2.CancelResponse = await self._stub.unary("Cancel", request)
        return response.status

    async def delete(self) -> llm_pb2.Deletion:
        """Delete the job with all that it has produced; return the deletion once it has ended.

        The deletion goes on if the caller does not wait for its end. Raises ApiError.
        """
        request = llm_pb2.DeleteJobRequest(workflow_id=self.workflow_id)
        response: llm_pb2.DeleteJobResponse = await self._stub.unary("DeleteJob", request)
        return await self._stub.deletion(response.deletion)

    async def deliveries(self) -> Sequence[llm_pb2.Delivery]:
        """Return the deliveries of the job's events with every attempt. Raises ApiError."""
        request = llm_pb2.ListDeliveriesRequest(workflow_id=self.workflow_id)
        response: llm_pb2.ListDeliveriesResponse = await self._stub.unary("ListDeliveries", request)
        return response.deliveries

    async def redeliver(self, *delivery_ids: str) -> Sequence[llm_pb2.Delivery]:
        """Send the outcome of the ended job again; return the deliveries as they were before the call.

        `delivery_ids` are those of the deliveries to send again, by default all of the outcome. Raises ApiError:
        JobNotEnded while the job has not ended.
        """
        request = llm_pb2.RedeliverRequest(workflow_id=self.workflow_id, delivery_ids=delivery_ids)
        response: llm_pb2.RedeliverResponse = await self._stub.unary("Redeliver", request)
        return response.deliveries

    async def watch(
        self, resume_token: str = "", *, output_offset: int = 0
    ) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield the messages of StreamStatus to the job's end, across broken connections and gateways.

        `resume_token` is as in `stream`. `output_offset` is for a caller who has no token: the number of bytes to skip,
        as in StreamStatusRequest. A job that does not succeed raises nothing here. Raises ApiError.
        """
        async with aclosing(self._stub.watch(self.workflow_id, resume_token, output_offset)) as messages:
            async for message in messages:
                if is_last(message):
                    outcome = llm_pb2.GetStatusResponse(status=message.status, result=message.result)
                    # Kept only once it is whole: the call may fail, or the caller may leave meanwhile.
                    self._outcome = await self.get() if message.output_omitted else outcome
                yield message

    async def stream(self, resume_token: str = "") -> AsyncGenerator[Piece, None]:
        """Yield the job's output as it is generated, each byte once.

        `resume_token` is that of the last piece that the caller holds. Without it the output comes from its start.
        Raises ApiError, and JobError at the end of a job that did not succeed.
        """
        async with aclosing(self.watch(resume_token)) as messages:
            async for message in messages:
                if message.HasField("delta"):
                    delta = message.delta
                    yield Piece(delta.text, delta.offset, delta.rewind, message.resume_token, tuple(delta.logprobs))
        self._succeeded()

    async def result(self, timeout: timedelta | None = None) -> llm_pb2.JobResult:  # noqa: ASYNC109  # as asyncio's
        """Wait for the job's end and return its result.

        The output is whole, also where it is a file: it is then read, and compared with the file's hash. It is in
        memory as a whole; `stream` yields it in pieces. The same holds for the partial output in a JobError.

        Raises ApiError, JobError for a job that did not succeed, and TimeoutError for a job that has not ended within
        `timeout`. That job continues. By default the wait has no limit.
        """
        async with asyncio.timeout(timeout.total_seconds() if timeout is not None else None):
            if self._outcome is None or _lacks_output(self._outcome.result):
                output = Output()
                async with aclosing(self.watch()) as messages:
                    async for message in messages:
                        if message.HasField("delta"):
                            output.add(message.delta)
                if self._outcome is not None and _lacks_output(self._outcome.result):
                    self._outcome.result.output = _checked(output, self._outcome.result.output_file)
        return self._succeeded()

    def _succeeded(self) -> llm_pb2.JobResult:
        if self._outcome is None:
            raise RuntimeError("the stream ended before the job did")
        error = from_outcome(self._outcome.status, self._outcome.result)
        if error is not None:
            raise error
        return self._outcome.result


def _lacks_output(result: llm_pb2.JobResult) -> bool:
    """Return whether the output of a result is a file that has not been read."""
    return bool(result.output_file.size_bytes) and not result.output


def _checked(output: Output, file: common_pb2.FileRef) -> str:
    """Return the text of an output that is a file. Raises DurableLLMError if it is not that of the file."""
    text = output.text
    if hashlib.sha256(text.encode()).digest() != file.sha256:
        raise DurableLLMError(f"what was received is not the content of {file.file_id}; call again")
    return text
