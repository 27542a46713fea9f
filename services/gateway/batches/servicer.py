"""The methods of BatchService: each calls the object that implements it. See services.gateway.servicer."""

from collections.abc import AsyncGenerator
from typing import Any

import grpc

from llm_pb import batch_pb2, batch_pb2_grpc
from runtime.answers import Answers
from runtime.grpc_auth import current_caller
from services.gateway.batches.listing import BatchListing
from services.gateway.batches.reader import BatchReader
from services.gateway.batches.results import BatchStreams
from services.gateway.batches.submission import BatchSubmission
from services.gateway.job_traces import link_call

_Context = grpc.aio.ServicerContext[Any, Any]


class BatchServicer(batch_pb2_grpc.BatchServiceServicer):
    """The methods of batch.proto."""

    def __init__(
        self,
        submission: BatchSubmission,
        reader: BatchReader,
        streams: BatchStreams,
        listing: BatchListing,
        answers: Answers,
    ) -> None:
        self._submission = submission
        self._reader = reader
        self._streams = streams
        self._listing = listing
        self._answers = answers

    async def CreateBatch(
        self, request: batch_pb2.CreateBatchRequest, context: _Context
    ) -> batch_pb2.CreateBatchResponse:
        """See batch.proto."""
        return batch_pb2.CreateBatchResponse(status=await self._submission.create(current_caller(), request))

    async def GetBatch(self, request: batch_pb2.GetBatchRequest, context: _Context) -> batch_pb2.GetBatchResponse:
        """See batch.proto."""
        description = await self._reader.describe(current_caller(), request.batch_id)
        await link_call(description)
        return batch_pb2.GetBatchResponse(status=(await self._reader.view_of(description)).record.status)

    def StreamBatch(
        self, request: batch_pb2.StreamBatchRequest, context: _Context
    ) -> AsyncGenerator[batch_pb2.StreamBatchResponse, None]:
        """See batch.proto."""
        return self._streams.watch(current_caller(), request, self._answers.of(context))

    def StreamBatchResults(
        self, request: batch_pb2.StreamBatchResultsRequest, context: _Context
    ) -> AsyncGenerator[batch_pb2.StreamBatchResultsResponse, None]:
        """See batch.proto."""
        return self._streams.results(current_caller(), request, self._answers.of(context))

    async def CancelBatch(
        self, request: batch_pb2.CancelBatchRequest, context: _Context
    ) -> batch_pb2.CancelBatchResponse:
        """See batch.proto."""
        return batch_pb2.CancelBatchResponse(status=await self._submission.cancel(current_caller(), request))

    async def ListBatches(
        self, request: batch_pb2.ListBatchesRequest, context: _Context
    ) -> batch_pb2.ListBatchesResponse:
        """See batch.proto."""
        response = await self._listing.list_page(current_caller(), request)
        await self._answers.of(context).reserve(response.ByteSize())
        return response
