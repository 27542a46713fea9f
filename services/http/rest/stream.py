"""A job's stream as server-sent events.

Each message of StreamStatus is an event `update`, the last one is `end`. The id of an event is its resume token, with
which a client that comes back continues. The id of `end` says that nothing follows: a browser that
opens the stream again, as it does whenever a stream ends, gets 204 and stops.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm import ApiError, is_last
from llm_pb import llm_pb2
from services.http.events import EventStream, comment, event
from services.http.failures import bad_request, of_call
from services.http.front import Front
from services.http.gateway import Calls
from services.http.rest.messages import to_json
from services.http.rest.problems import problem

END: Final = "end"
"""The id of the event that ends a stream. No resume token has so few characters."""
PARAMETER: Final = "last_event_id"
"""The parameter of the query with the id of the last event that a client holds, for clients that set no header."""
_Messages = AsyncGenerator[llm_pb2.StreamStatusResponse, None]


async def stream(front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the stream of a job. The request's credential names the caller."""
    return await stream_to(front.gateway.of(request), front, request, query)


async def stream_to(calls: Calls, front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the stream of a job from where the client left, or from its start."""
    (asked,) = query.get(PARAMETER, [""])
    # A browser repeats the query when it comes back, and adds the header.
    place = request.headers.get("last-event-id") or asked
    if not place.isascii():
        raise bad_request(message="the last event id is none of this API")
    workflow_id = request.path_params["id"]
    if request.method == "HEAD" or place == END:
        await calls.call("GetStatus", llm_pb2.GetStatusRequest(workflow_id=workflow_id))
        if place == END:
            return Response(status_code=HTTPStatus.NO_CONTENT)
        return Response(media_type=EventStream.media_type)
    messages = calls.watch(workflow_id, place)
    try:
        # A call that is refused has an HTTP status of its own.
        first = await anext(messages)
        return EventStream(_events(first, messages), front)
    except BaseException:
        await messages.aclose()
        raise


async def _events(first: llm_pb2.StreamStatusResponse, messages: _Messages) -> AsyncGenerator[bytes, None]:
    async with aclosing(messages):
        yield _event(first)
        try:
            async for message in messages:
                yield _event(message)
        except ApiError as error:
            failure = of_call(error)
            # After any other error the client comes back and continues, here or at another front.
            if failure.status < HTTPStatus.INTERNAL_SERVER_ERROR and failure.status != HTTPStatus.TOO_MANY_REQUESTS:
                yield event(problem(failure), name="problem")


def _event(message: llm_pb2.StreamStatusResponse) -> bytes:
    if is_last(message):
        return event(to_json(message), name="end", id=END)
    if not (message.HasField("status") or message.HasField("delta")):
        return comment("nothing new")
    return event(to_json(message), name="update", id=message.resume_token)
