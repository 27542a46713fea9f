"""The stub of BatchService with retries: a stream that breaks goes on where it broke."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from durable_llm._streaming_stub import StreamingStub
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


class RetryingBatchStub(StreamingStub):
    """A stub of BatchService. All of its calls are safe to repeat."""

    async def statuses(self, batch_id: str) -> AsyncGenerator[batch_pb2.BatchStatus, None]:
        """Yield the statuses of a batch, the last one final. Raises ApiError."""
        request = batch_pb2.StreamBatchRequest(batch_id=batch_id)
        async with aclosing(self.messages("StreamBatch", lambda: request, until_end=True)) as messages:
            async for message in messages:
                yield message.status
                if message.status.state in FINAL_BATCH_STATES:
                    return

    async def results(self, batch_id: str, cursor: str) -> AsyncGenerator[batch_pb2.StreamBatchResultsResponse, None]:
        """Yield the messages of StreamBatchResults from a cursor on, to the last item. Raises ApiError."""

        def request() -> batch_pb2.StreamBatchResultsRequest:
            return batch_pb2.StreamBatchResultsRequest(batch_id=batch_id, cursor=cursor)

        async with aclosing(self.messages("StreamBatchResults", request)) as messages:
            async for message in messages:
                cursor = message.cursor
                yield message
