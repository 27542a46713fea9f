"""A batch's status and its results as server-sent events.

Each message of StreamBatch is an event `update`, the last one is `end`. Each message of StreamBatchResults is an event
`items` whose id is its cursor, with which a client that comes back continues; `end` follows the last one. As in a job's
stream, a client that opens one again after `end` gets 204.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from durable_llm._batch_stub import FINAL_BATCH_STATES
from llm_pb import batch_pb2
from services.http.events import EventStream, event
from services.http.front import Front
from services.http.gateway import Calls
from services.http.rest.messages import to_json
from services.http.rest.stream import END, events_of, opened, place_of, without_stream


async def stream_status(front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the statuses of a batch to whom the request's credential names."""
    return await status_to(front.gateway.of(request), front, request, query)


async def status_to(calls: Calls, front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the statuses of a batch, the present one first."""
    place = place_of(request, query)
    if (answer := await without_stream(request, place, lambda: _get(calls, request))) is not None:
        return answer
    return await opened(_statuses(calls, request.path_params["id"]), _as_event, front)


async def stream_results(front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the items of a batch that have ended, from where the client left."""
    calls, place = front.gateway.of(request), place_of(request, query)
    if (answer := await without_stream(request, place, lambda: _get(calls, request))) is not None:
        return answer
    # The first item may be long in coming: this tells at once that there is such a batch.
    await _get(calls, request)
    return EventStream(_results(calls, request.path_params["id"], place), front)


async def _get(calls: Calls, request: Request) -> Any:
    return await calls.call("GetBatch", batch_pb2.GetBatchRequest(batch_id=request.path_params["id"]))


async def _statuses(calls: Calls, batch_id: str) -> AsyncGenerator[batch_pb2.BatchStatus, None]:
    with calls.batches("StreamBatch") as batches:
        async with aclosing(batches.watch(batch_id)) as statuses:
            async for status in statuses:
                yield status


async def _results(calls: Calls, batch_id: str, cursor: str) -> AsyncGenerator[bytes, None]:
    async def messages() -> AsyncGenerator[batch_pb2.StreamBatchResultsResponse | None, None]:
        with calls.batches("StreamBatchResults") as batches:
            async with aclosing(batches.results(batch_id, cursor)) as found:
                async for message in found:
                    yield message
        yield None

    async with aclosing(events_of(messages(), _as_items)) as events:
        async for one in events:
            yield one


def _as_event(status: batch_pb2.BatchStatus) -> bytes:
    data = to_json(batch_pb2.StreamBatchResponse(status=status))
    if status.state in FINAL_BATCH_STATES:
        return event(data, name="end", id=END)
    return event(data, name="update")


def _as_items(message: batch_pb2.StreamBatchResultsResponse | None) -> bytes:
    if message is None:
        return event({}, name="end", id=END)
    return event(to_json(message), name="items", id=message.cursor)
