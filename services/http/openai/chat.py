"""The paths `/v1/chat/completions` and `/v1/completions`."""

from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from openai_api.endpoints import COMPLETIONS, READERS
from openai_api.outcome import failed_completion
from services.http.bodies import query_of, read_object
from services.http.events import EventStream
from services.http.front import Front
from services.http.openai.answers import answered, failed
from services.http.openai.repeats import Tries
from services.http.openai.submission import require_may_delete, submit
from services.http.openai.watching import cleanups, completion_stream, ending_for, no_answer
from services.http.resources import Resource


class Completions:
    """Answers the requests."""

    def __init__(self, front: Front) -> None:
        self._front = front

    @property
    def resources(self) -> Sequence[Resource]:
        """The paths."""
        return [Resource(path, {"POST": partial(self._create, path)}) for path in COMPLETIONS]

    async def _create(self, path: str, request: Request) -> Response:
        query_of(request, ())
        body = await read_object(request, self._front.settings)
        asked = READERS[path](body)
        tries = Tries.of(request, body)
        self._front.require_place()
        calls = self._front.gateway.of(request)
        if not asked.store:
            await require_may_delete(calls)
        accepted = await submit(calls, asked, tries, self._front.settings.unwatched_timeout)
        id_ = accepted.workflow_id
        after, gone = cleanups(calls, id_, asked, tries)
        completion = COMPLETIONS[path](accepted.job, accepted.status, include_usage=asked.include_usage)
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
