"""The stub of BatchService with retries: a stream that breaks goes on where it broke."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Any, Final

import grpc

from durable_llm._retrying_stub import RESET, RetryingStub, Silence
from durable_llm._statuses import from_call
from durable_llm.errors import ApiError, Unavailable
from llm_pb import batch_pb2

FINAL_BATCH_STATES: Final = frozenset(
    {
        batch_pb2.BATCH_STATE_SUCCEEDED,
        batch_pb2.BATCH_STATE_FAILED,
        batch_pb2.BATCH_STATE_CANCELLED,
        batch_pb2.BATCH_STATE_EXPIRED,
    }
)
"""The states in which a batch stays."""
_QUIET: Final = timedelta(minutes=5)
"""Time without a message after which a stream is opened anew. A batch may be quiet for long while it waits."""


class RetryingBatchStub(RetryingStub):
    """A stub of BatchService. All of its calls are safe to repeat."""

    async def statuses(self, batch_id: str) -> AsyncGenerator[batch_pb2.BatchStatus, None]:
        """Yield the statuses of a batch, the last one final. Raises ApiError."""
        request = batch_pb2.StreamBatchRequest(batch_id=batch_id)
        async with aclosing(self._messages("StreamBatch", lambda: request, until_end=True)) as messages:
            async for message in messages:
                yield message.status
                if message.status.state in FINAL_BATCH_STATES:
                    return

    async def results(self, batch_id: str, cursor: str) -> AsyncGenerator[batch_pb2.StreamBatchResultsResponse, None]:
        """Yield the messages of StreamBatchResults from a cursor on, to the last item. Raises ApiError."""

        def request() -> batch_pb2.StreamBatchResultsRequest:
            return batch_pb2.StreamBatchResultsRequest(batch_id=batch_id, cursor=cursor)

        async with aclosing(self._messages("StreamBatchResults", request)) as messages:
            async for message in messages:
                cursor = message.cursor
                yield message

    async def _messages(
        self, method: str, request: Callable[[], Any], *, until_end: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Yield the messages of a stream, opened anew when it breaks. It ends with OK, if not `until_end`."""
        silence = Silence()
        while True:
            call = getattr(self._stub, method)(request(), metadata=self._metadata)
            messages = aiter(call)
            try:
                while True:
                    try:
                        with silence.growing():
                            async with asyncio.timeout(_QUIET.total_seconds()):
                                message = await anext(messages, None)
                    except TimeoutError:
                        # Nothing was lost: it is opened anew, which shows whether the service is there.
                        silence = Silence()
                        break
                    except grpc.aio.AioRpcError as error:
                        raise _failure(error) from error
                    self._answered = True
                    if message is None and not until_end:
                        return
                    if message is None:
                        raise Unavailable("the stream ended before the batch did", grpc.StatusCode.UNAVAILABLE)
                    silence = Silence()
                    yield message
            except ApiError as error:
                await self.back_off(error, silence, f"opening {method} again")
            finally:
                call.cancel()


def _failure(error: grpc.aio.AioRpcError) -> ApiError:
    failure = from_call(error)
    # A proxy resets the stream when its gateway dies. The gateway's own errors have a reason.
    if failure.code in RESET and not failure.reason:
        return Unavailable(str(failure), grpc.StatusCode.UNAVAILABLE)
    return failure
