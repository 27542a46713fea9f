"""A pipeline's tree and the output of followed steps as server-sent events.

Each message of StreamPipeline is an event `update` whose id is its cursor, with which a client that comes back
continues. The last one is `end`. As in a job's stream, a client that opens one again after `end` gets 204.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm import FINAL_STATES
from llm_pb import pipeline_pb2
from services.http.events import comment, event
from services.http.front import Front
from services.http.gateway import Calls
from services.http.rest.messages import to_json
from services.http.rest.stream import END, opened, place_of, without_stream

FOLLOW: Final = "follow"
"""The parameter of the query with a path of steps whose output is sent. It may be there more than once."""


async def stream_pipeline(front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the stream of a pipeline. The request's credential names the caller."""
    return await pipeline_to(front.gateway.of(request), front, request, query)


async def pipeline_to(calls: Calls, front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the stream of a pipeline from where the client left, or from its start."""
    place, pipeline_id = place_of(request, query), request.path_params["id"]
    known = pipeline_pb2.GetPipelineRequest(pipeline_id=pipeline_id)
    if (answer := await without_stream(request, place, lambda: calls.call("GetPipeline", known))) is not None:
        return answer
    return await opened(_messages(calls, pipeline_id, query.get(FOLLOW, []), place), _as_event, front)


async def _messages(
    calls: Calls, pipeline_id: str, follow: list[str], cursor: str
) -> AsyncGenerator[pipeline_pb2.StreamPipelineResponse, None]:
    with calls.pipelines("StreamPipeline") as pipelines:
        async with aclosing(pipelines.watch(pipeline_id, follow, cursor)) as messages:
            async for message in messages:
                yield message


def _as_event(message: pipeline_pb2.StreamPipelineResponse) -> bytes:
    if message.HasField("status") and message.status.state in FINAL_STATES:
        return event(to_json(message), name="end", id=END)
    if not (message.HasField("status") or message.steps or message.HasField("delta") or message.rewind):
        return comment("nothing new")
    return event(to_json(message), name="update", id=message.cursor)
