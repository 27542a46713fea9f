"""The batches of AsyncClient."""

import hashlib
import os
import uuid
from asyncio import to_thread
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from durable_llm._batch_stub import RetryingBatchStub
from durable_llm._files import AsyncFiles
from llm_pb import batch_pb2

_PIECE = 1024 * 1024


class AsyncBatches:
    """The batches of the caller's tenant."""

    def __init__(self, stub: RetryingBatchStub, files: AsyncFiles) -> None:
        self._stub = stub
        self._files = files

    async def create(self, batch: batch_pb2.BatchRequest | None = None, /, **fields: Any) -> batch_pb2.BatchStatus:
        """Start a batch and return its status. One that was started before under its key is returned.

        A batch is a BatchRequest, or its fields by name: `user_id="alice", input={"file_id": …}`. A batch without a
        request_id gets a random one. Raises ApiError, and ValueError or TypeError for a field that it does not have.
        """
        request = batch_pb2.BatchRequest(**fields)
        if batch is not None:
            request.MergeFrom(batch)
        if not request.request_id:
            request.request_id = uuid.uuid4().hex
        response: batch_pb2.CreateBatchResponse = await self._stub.unary(
            "CreateBatch", batch_pb2.CreateBatchRequest(batch=request)
        )
        return response.status

    async def start(self, path: str | os.PathLike[str], *, user_id: str, **fields: Any) -> batch_pb2.BatchStatus:
        """Upload a file of lines, and create its batch. A repeat with the same lines finds the batch.

        The hash of the file is the request_id of upload and batch, unless another one is given. Raises like
        AsyncFiles.upload and create().
        """
        request_id = fields.pop("request_id", "") or f"sha256-{await to_thread(_hash_of, path)}"
        file = await self._files.upload(
            path,
            user_id=user_id,
            request_id=request_id,
            filename=os.path.basename(path),
            purpose="batch",
            media_type="application/jsonl",
        )
        reference = {"file_id": file.ref.file_id}
        return await self.create(user_id=user_id, request_id=request_id, input=reference, **fields)

    async def get(self, batch_id: str) -> batch_pb2.BatchStatus:
        """Return the status of a batch. Raises ApiError."""
        request = batch_pb2.GetBatchRequest(batch_id=batch_id)
        response: batch_pb2.GetBatchResponse = await self._stub.unary("GetBatch", request)
        return response.status

    async def watch(self, batch_id: str) -> AsyncGenerator[batch_pb2.BatchStatus, None]:
        """Yield the statuses of a batch, the last one final. A stream that breaks is opened again. Raises ApiError."""
        async with aclosing(self._stub.statuses(batch_id)) as statuses:
            async for status in statuses:
                yield status

    async def results(
        self, batch_id: str, cursor: str = ""
    ) -> AsyncGenerator[batch_pb2.StreamBatchResultsResponse, None]:
        """Yield items that have ended, some at a time with a cursor, until all of the batch were read.

        Each item comes once, whatever breaks. A cursor continues in another process. Raises ApiError.
        """
        async with aclosing(self._stub.results(batch_id, cursor)) as messages:
            async for message in messages:
                yield message

    async def cancel(self, batch_id: str, reason: str = "") -> batch_pb2.BatchStatus:
        """Request that a batch stops; return its status. What has ended is kept. Raises ApiError."""
        request = batch_pb2.CancelBatchRequest(batch_id=batch_id, reason=reason)
        response: batch_pb2.CancelBatchResponse = await self._stub.unary("CancelBatch", request)
        return response.status

    async def list(self, **filters: Any) -> AsyncGenerator[batch_pb2.BatchStatus, None]:
        """Yield batches, open ones first, page after page. The filters are the fields of ListBatchesRequest.

        Raises ApiError, and ValueError for a filter that ListBatchesRequest does not have.
        """
        listed = self._stub.listed("ListBatches", batch_pb2.ListBatchesRequest(**filters), "batches")
        async with aclosing(listed):
            async for status in listed:
                yield status


def _hash_of(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
