"""The paths of batches."""

import functools
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import batch_pb2
from services.http.front import Front
from services.http.rest.batch_streams import stream_results, stream_status
from services.http.rest.handlers import Handlers, Query, list_parameters, located
from services.http.rest.operations import Operation, Parameter, Paths, streamed
from services.http.rest.stream import PLACE

_STATES: Final = [value.name for value in batch_pb2.BatchState.DESCRIPTOR.values if value.number]
_LIST: Final = list_parameters(
    "batches",
    state=Parameter(
        "Lists only batches in this state. It may be there up to 16 times.",
        {"type": "array", "items": {"type": "string", "enum": _STATES}},
    ),
    project_id=Parameter("Lists only batches with this label."),
)


class Batches(Handlers):
    """The handlers."""

    id_field = "batch_id"

    async def create(self, request: Request, _: Query) -> Response:
        """Start a batch. The body is a BatchRequest."""
        response = await self._send(request, "CreateBatch", batch_pb2.CreateBatchRequest(), "batch")
        return located(response, "batches", response.status.batch_id)

    async def list(self, request: Request, query: Query) -> Response:
        """List batches. The query holds the fields of ListBatchesRequest."""
        return await self._list(request, "ListBatches", batch_pb2.ListBatchesRequest(), query, {"state": "states"})

    async def get(self, request: Request, _: Query) -> Response:
        """Return the status of a batch."""
        return await self._answer(request, "GetBatch", batch_pb2.GetBatchRequest())

    async def cancel(self, request: Request, _: Query) -> Response:
        """Request that a batch stops."""
        return await self._answer_to_body(request, "CancelBatch", batch_pb2.CancelBatchRequest())


def paths(front: Front) -> Paths:
    """Return the operations. The paths with a suffix come first, because an id may hold `/`."""
    batches, pb = Batches(front), batch_pb2
    return {
        "/batches": {
            "POST": Operation(
                "CreateBatch",
                "Starts a batch, or finds the one with the same user_id and request_id.",
                batches.create,
                pb.CreateBatchResponse,
                HTTPStatus.ACCEPTED,
                body=pb.BatchRequest,
            ),
            "GET": Operation(
                "ListBatches", "Lists batches, open ones first.", batches.list, pb.ListBatchesResponse, query=_LIST
            ),
        },
        "/batches/{id:id}/stream": {
            "GET": streamed(
                "StreamBatch",
                "Watches a batch to its end, as server-sent events whose data are StreamBatchResponse.",
                functools.partial(stream_status, front),
                pb.StreamBatchResponse,
                PLACE,
            )
        },
        "/batches/{id:id}/results": {
            "GET": streamed(
                "StreamBatchResults",
                "Returns the items that have ended, each once, as server-sent events whose data are"
                " StreamBatchResultsResponse.",
                functools.partial(stream_results, front),
                pb.StreamBatchResultsResponse,
                PLACE,
            )
        },
        "/batches/{id:id}/cancel": {
            "POST": Operation(
                "CancelBatch",
                "Requests that a batch stops.",
                batches.cancel,
                pb.CancelBatchResponse,
                body=pb.CancelBatchRequest,
                body_without=("batch_id",),
            )
        },
        "/batches/{id:id}": {
            "GET": Operation("GetBatch", "Returns the status of a batch.", batches.get, pb.GetBatchResponse)
        },
    }
