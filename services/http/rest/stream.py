"""A job's stream as server-sent events.

Each message of StreamStatus is an event `update`, the last one is `end`. The id of an event is its resume token, with
which a client that comes back continues. The id of `end` says that nothing follows: a browser that
opens the stream again, as it does whenever a stream ends, gets 204 and stops.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from durable_llm import ApiError, is_last
from llm_pb import llm_pb2
from services.http.events import EventStream, comment, event
from services.http.failures import bad_request, of_call
from services.http.front import Front
from services.http.gateway import Calls
from services.http.rest.messages import to_json
from services.http.rest.operations import Parameter
from services.http.rest.problems import problem

END: Final = "end"
"""The id of the event that ends a stream. No resume token has so few characters."""
PARAMETER: Final = "last_event_id"
"""The parameter of the query with the id of the last event that a client holds, for clients that set no header."""
PLACE: Final = {
    PARAMETER: Parameter("The id of the last event that the client holds. The header Last-Event-ID takes precedence.")
}
M = TypeVar("M")


async def stream(front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the stream of a job. The request's credential names the caller."""
    return await stream_to(front.gateway.of(request), front, request, query)


async def stream_to(calls: Calls, front: Front, request: Request, query: Mapping[str, list[str]]) -> Response:
    """Answer with the stream of a job from where the client left, or from its start."""
    place = place_of(request, query)
    workflow_id = request.path_params["id"]
    known = llm_pb2.GetStatusRequest(workflow_id=workflow_id)
    if (answer := await without_stream(request, place, lambda: calls.call("GetStatus", known))) is not None:
        return answer
    return await opened(calls.watch(workflow_id, place), _event, front)


async def without_stream(request: Request, place: str, look: Callable[[], Awaitable[Any]]) -> Response | None:
    """Return the answer to a request that needs no stream: HEAD, or one that follows the last event.

    `look` raises ApiError if there is nothing to watch.
    """
    if request.method != "HEAD" and place != END:
        return None
    await look()
    if place == END:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return Response(media_type=EventStream.media_type)


def place_of(request: Request, query: Mapping[str, list[str]]) -> str:
    """Return the id of the last event that the client holds; empty without one. Raises Failure, 400."""
    (asked,) = query.get(PARAMETER, [""])
    # A browser repeats the query when it comes back, and adds the header.
    place = request.headers.get("last-event-id") or asked
    if not place.isascii():
        raise bad_request(message="the last event id is none of this API")
    return place


async def opened(messages: AsyncGenerator[M, None], as_event: Callable[[M], bytes], front: Front) -> Response:
    """Answer with a stream whose first message has come: a call that is refused has an HTTP status of its own."""
    try:
        first = await anext(messages)
        return EventStream(_with_first(as_event(first), events_of(messages, as_event)), front)
    except BaseException:
        await messages.aclose()
        raise


async def _with_first(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        yield first
        async for one in events:
            yield one


async def events_of(messages: AsyncGenerator[M, None], as_event: Callable[[M], bytes]) -> AsyncGenerator[bytes, None]:
    """Yield messages as events. After an error that a new try meets again, the last event is `problem`."""
    async with aclosing(messages):
        try:
            async for message in messages:
                yield as_event(message)
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
