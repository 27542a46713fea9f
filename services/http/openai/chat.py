"""The paths `/v1/chat/completions` and `/v1/completions`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from openai_api.asked import Asked
from openai_api.chat_request import read_chat_request, read_completion_request
from openai_api.completions import ChatCompletion, Completion, TextCompletion
from openai_api.outcome import failed_completion
from services.http.bodies import query_of, read_object
from services.http.events import EventStream
from services.http.front import Front
from services.http.openai.answers import answered, failed
from services.http.openai.repeats import Tries
from services.http.openai.submission import require_may_delete, submit
from services.http.openai.watching import cleanups, completion_stream, ending_for, no_answer
from services.http.resources import Resource


class _Endpoint(NamedTuple):
    path: str
    read: Callable[[Any], Asked]
    completion: type[Completion]


_ENDPOINTS = (
    _Endpoint("/v1/chat/completions", read_chat_request, ChatCompletion),
    _Endpoint("/v1/completions", read_completion_request, TextCompletion),
)


class Completions:
    """Answers the requests."""

    def __init__(self, front: Front) -> None:
        self._front = front

    @property
    def resources(self) -> Sequence[Resource]:
        """The paths."""
        return [Resource(endpoint.path, {"POST": partial(self._create, endpoint)}) for endpoint in _ENDPOINTS]

    async def _create(self, endpoint: _Endpoint, request: Request) -> Response:
        query_of(request, ())
        body = await read_object(request, self._front.settings)
        asked = endpoint.read(body)
        tries = Tries.of(request, body)
        self._front.require_place()
        calls = self._front.gateway.of(request)
        if not asked.store:
            await require_may_delete(calls)
        accepted = await submit(calls, asked, tries, self._front.settings.unwatched_timeout)
        id_ = accepted.workflow_id
        after, gone = cleanups(calls, id_, asked, tries)
        completion = endpoint.completion(accepted.job, accepted.status, include_usage=asked.include_usage)
        async with no_answer(after):
            if asked.stream:
                chunks = completion_stream(calls, accepted, completion)
                return EventStream(chunks, self._front, on_disconnect=gone, after=after, retry=False)
            ending = await ending_for(request, self._front, calls, id_)
        if ending is None:
            if gone is not None:
                await gone()
            return Response()
        if (failure := failed_completion(ending)) is not None:
            return failed(*failure, after)
        return answered(completion.object(ending), after)
