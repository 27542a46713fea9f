"""The paths under `/v1/responses`."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm import FINAL_STATES
from jobs.response_ids import workflow_id_of
from llm_pb import llm_pb2
from openai_api.asked import Note
from openai_api.errors import invalid, unsupported
from openai_api.outcome import Ending
from openai_api.response_object import response_object
from openai_api.responses_request import LOGPROBS, read_responses_request
from services.http.bodies import query_of, read_object
from services.http.events import EventStream
from services.http.failures import Failure
from services.http.front import Front
from services.http.openai.answers import answered
from services.http.openai.input_items import input_items, page_of
from services.http.openai.repeats import Tries
from services.http.openai.response_events import Place
from services.http.openai.submission import find, require_may_delete, submit
from services.http.openai.watching import cleanups, ending_for, ending_of, no_answer, response_stream, whole
from services.http.resources import Resource

_INCLUDE: Final = ("include", "include[]")
_CANCEL_SECONDS: Final = 10
"""Maximum wait for the end of a job after its cancel."""
_MAX_NUMBER: Final = 2**63


class Responses:
    """Answers the requests."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._most = front.settings.max_output_bytes

    @property
    def resources(self) -> Sequence[Resource]:
        """The paths."""
        one = "/v1/responses/{id}"
        return (
            Resource("/v1/responses", {"POST": self.create}),
            Resource(f"{one}/cancel", {"POST": self.cancel}),
            Resource(f"{one}/input_items", {"GET": self.input_items}),
            Resource(one, {"GET": self.retrieve, "DELETE": self.delete}),
        )

    async def create(self, request: Request) -> Response:
        """Submit a job and answer with its response or its events."""
        query_of(request, ())
        body = await read_object(request, self._front.settings)
        asked = read_responses_request(body)
        tries = Tries.of(request, body)
        if asked.stream or not asked.background:
            self._front.require_place()
        calls = self._front.gateway.of(request)
        if not asked.store:
            await require_may_delete(calls)
        accepted = await submit(calls, asked, tries, self._front.settings.unwatched_timeout)
        id_, job = accepted.workflow_id, accepted.job
        after, gone = cleanups(calls, id_, asked, tries)
        if asked.background and not asked.stream:
            return answered(response_object(job, accepted.status))
        async with no_answer(after):
            if asked.stream:
                now = Ending(accepted.status, llm_pb2.JobResult())
                if accepted.status.state in FINAL_STATES:
                    job, now = await find(calls, id_)
                events = response_stream(calls, job, now, Place(), self._most)
                return EventStream(events, self._front, on_disconnect=gone, after=after, retry=False)
            ending = await ending_for(request, self._front, calls, id_)
        if ending is None:
            if gone is not None:
                await gone()
            return Response()
        return answered(response_object(job, *ending), after)

    async def retrieve(self, request: Request) -> Response:
        """Answer with the present response, or with its events after one that the client has."""
        query = query_of(request, ("stream", "starting_after", "include_obfuscation"), repeated=_INCLUDE)
        for name in (name for key in _INCLUDE for name in query.get(key, ())):
            if name != LOGPROBS:
                raise unsupported("include", f"it is {name!r}")
        _flag(query, "include_obfuscation", only=False)
        streams = _flag(query, "stream")
        place = Place(_integer(query, "starting_after", 0, _MAX_NUMBER, -1))
        if place.starting_after >= 0 and not streams:
            raise invalid("starting_after", "needs stream to be true")
        calls = self._front.gateway.of(request)
        job, now = await find(calls, _workflow_id(request))
        if not streams:
            return answered(response_object(job, *await whole(calls, now, self._most)))
        if request.method == "HEAD":
            return Response(media_type=EventStream.media_type)
        return EventStream(response_stream(calls, job, now, place, self._most), self._front, retry=False)

    async def cancel(self, request: Request) -> Response:
        """Cancel a response in the background and answer with the response after that."""
        query_of(request, ())
        calls, id_ = self._front.gateway.of(request), _workflow_id(request)
        job, now = await find(calls, id_)
        if not Note.of(job.labels).background:
            message = "only a response that was created with background=true can be cancelled; end the connection"
            raise Failure(HTTPStatus.BAD_REQUEST, message, "NOT_IN_BACKGROUND")
        if now.status.state not in FINAL_STATES:
            await calls.call("Cancel", llm_pb2.CancelRequest(workflow_id=id_, reason="cancelled by its caller"))
            with suppress(TimeoutError):
                async with asyncio.timeout(_CANCEL_SECONDS):
                    now = await ending_of(calls, id_, self._most)
        return answered(response_object(job, *await whole(calls, now, self._most)))

    async def delete(self, request: Request) -> Response:
        """Delete a response."""
        query_of(request, ())
        workflow_id = _workflow_id(request)
        calls = self._front.gateway.of(request)
        await calls.call("DeleteJob", llm_pb2.DeleteJobRequest(workflow_id=workflow_id))
        return answered({"id": request.path_params["id"], "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """Answer with the messages of the input."""
        query = query_of(request, ("after", "limit", "order"), repeated=_INCLUDE)
        limit = _integer(query, "limit", 1, 101, 20)
        order = query.get("order", ["desc"])[0]
        if order not in ("asc", "desc"):
            raise invalid("order", "must be asc or desc")
        job, now = await find(self._front.gateway.of(request), _workflow_id(request))
        items = input_items(job, now.status)
        after = query.get("after", [""])[0]
        return answered(page_of(items if order == "asc" else items[::-1], after, limit))


def _workflow_id(request: Request) -> str:
    """Return the id of the job whose response the path names. Raises Failure, 404."""
    id_ = request.path_params["id"]
    try:
        return workflow_id_of(id_)
    except ValueError:
        raise Failure(HTTPStatus.NOT_FOUND, f"there is no response {id_!r}", "JOB_NOT_FOUND") from None


def _flag(query: Mapping[str, list[str]], name: str, *, only: bool | None = None) -> bool:
    value = query.get(name, ["false"])[0].lower()
    if value not in ("true", "false"):
        raise invalid(name, "must be true or false")
    if only is not None and (value == "true") is not only:
        raise unsupported(name, f"it may only be {str(only).lower()}")
    return value == "true"


def _integer(query: Mapping[str, list[str]], name: str, least: int, bound: int, otherwise: int) -> int:
    if name not in query:
        return otherwise
    value = query[name][0]
    if not (value.isascii() and value.isdigit() and len(value) < 20 and least <= int(value) < bound):
        raise invalid(name, f"must be an integer from {least} to {bound - 1}")
    return int(value)
