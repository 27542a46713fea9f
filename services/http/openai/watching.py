"""Watches jobs for requests: until they end, and as streams of events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from http import HTTPStatus

from starlette.requests import Request

from durable_llm import ApiError
from llm_pb import llm_pb2
from openai_api.asked import Asked
from openai_api.completions import Completion
from openai_api.errors import error_object
from openai_api.outcome import FINAL_STATES, Ending, failed_completion
from services.http.events import event
from services.http.failures import Failure, of_call, unavailable
from services.http.front import Front
from services.http.gateway import Calls
from services.http.large_outputs import with_text
from services.http.openai.repeats import Tries
from services.http.openai.response_events import Event, Place, ResponseEvents, Rewound, ended_events, is_replaced
from services.http.openai.submission import Accepted, find

_log = logging.getLogger(__name__)

Cleanup = Callable[[], Awaitable[None]]
_DONE = "[DONE]"
"""The event that ends the stream of a completion."""
_NOT_STARTED = (llm_pb2.JOB_STATE_UNSPECIFIED, llm_pb2.JOB_STATE_QUEUED)


async def ending_of(calls: Calls, workflow_id: str, most: int) -> Ending:
    """Wait for the end of a job, and return it with its output.

    Raises ApiError; Failure for an output of more than `most` bytes.
    """
    last = Ending(llm_pb2.JobStatus(), llm_pb2.JobResult())
    omitted = False
    async with aclosing(calls.watch(workflow_id)) as messages:
        async for message in messages:
            last, omitted = _later(last, message), message.output_omitted
    return await whole(calls, (await find(calls, workflow_id))[1] if omitted else last, most)


async def whole(calls: Calls, ending: Ending, most: int) -> Ending:
    """Return the present state of a job, with the output of one that has ended. Raises as ending_of."""
    return Ending(ending.status, await with_text(calls, ending.status.workflow_id, ending.result, most))


async def ending_for(request: Request, front: Front, calls: Calls, workflow_id: str) -> Ending | None:
    """Wait for the end of a job as long as the client does. Return None once the client has gone.

    Raises ApiError; Failure, 503, when the front shuts down or has no place for the request, and as ending_of.
    """
    with front.stream():
        ending = asyncio.create_task(ending_of(calls, workflow_id, front.settings.max_output_bytes))
        leaving = asyncio.create_task(_disconnected(request))
        draining = asyncio.create_task(front.draining.wait())
        tasks = (ending, leaving, draining)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                return await ending
            if leaving.done():
                return None
            raise unavailable("the front is shutting down; call again", "FRONT_SHUTDOWN")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def response_stream(
    calls: Calls, job: llm_pb2.JobRequest, now: Ending, place: Place, most: int
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a response that follow a place, to its end. `now` is the present state of the job.

    The stream of an output of more than `most` bytes ends with an error: the last events would hold all of it.
    """
    async with aclosing(_response_events(calls, job, now, place, most)) as groups:
        async for group in groups:
            # Each write wakes the client, which costs more than an event.
            if group:
                yield b"".join(event(item, name=item["type"]) for item in group)


async def _response_events(
    calls: Calls, job: llm_pb2.JobRequest, now: Ending, place: Place, most: int
) -> AsyncGenerator[Sequence[Event], None]:
    """Yield the events in groups, each of those that are known at the same time. Large ones are groups of their own."""
    size = now.result.output_file.size_bytes
    if now.status.state in FINAL_STATES and not size:
        for item in ended_events(job, now, place):
            yield (item,)
        return
    metadata = now.result.metadata
    events = ResponseEvents(job, now.status, place, metadata.rewinds)
    last, omitted = now, False
    try:
        if size and is_replaced(metadata, place):
            raise Rewound
        yield tuple(events.begin())
        # The closing events count as bytes.
        offset = min(place.offset, size) if size else place.offset
        async with aclosing(calls.watch(now.status.workflow_id, output_offset=offset)) as messages:
            async for message in messages:
                last, omitted = _later(last, message), message.output_omitted
                if last.status.state not in _NOT_STARTED:
                    yield tuple(events.started())
                if message.HasField("delta"):
                    yield tuple(events.text(message.delta, message.rewinds))
        if omitted:
            _, last = await find(calls, now.status.workflow_id)
        last = await whole(calls, last, most)
        for item in events.end(last):
            yield (item,)
    except Rewound:
        yield (events.rewound(),)
    except Failure as too_large:
        yield (events.error(too_large.reason.lower(), too_large.message),)
    except ApiError as error:
        failure = of_call(error)
        yield (events.broken(failure.reason.lower() or "server_error", failure.message),)


async def completion_stream(calls: Calls, accepted: Accepted, completion: Completion) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a completion. One that fails ends with an error object."""
    last = Ending(accepted.status, llm_pb2.JobResult())
    try:
        for chunk in completion.begin():
            yield event(chunk)
        async with aclosing(calls.watch(accepted.workflow_id)) as messages:
            async for message in messages:
                last = _later(last, message)
                if message.delta.rewind:
                    words = "the job has started over and its output differs; call again"
                    yield event(error_object(words, HTTPStatus.INTERNAL_SERVER_ERROR, "output_replaced"))
                    return
                for chunk in completion.text(message.delta):
                    yield event(chunk)
    except ApiError as error:
        failure = of_call(error)
        yield event(error_object(failure.message, failure.status, failure.reason.lower() or None))
        return
    if (failed := failed_completion(last)) is not None:
        yield event(failed[1])
    else:
        yield b"".join(event(chunk) for chunk in (*completion.end(last), _DONE))


@asynccontextmanager
async def no_answer(after: Cleanup | None) -> AsyncIterator[None]:
    """Await `after` when the block raises, because no answer will await it. The client cannot try again before that."""
    try:
        yield
    except Exception:
        if after is not None:
            await after()
        raise


def cleanups(calls: Calls, workflow_id: str, asked: Asked, tries: Tries) -> tuple[Cleanup | None, Cleanup | None]:
    """Return what to do with a job when its answer has ended, and when its client has gone before. None: nothing.

    A job that another try of the request may want is left to its lease: see JobRequest.cancel_if_unwatched.
    """
    after = None if asked.store else partial(delete, calls, workflow_id)
    if asked.background:
        return after, None
    if after is not None or tries.may_follow(stream=asked.stream):
        return after, after
    return None, partial(cancel, calls, workflow_id)


async def cancel(calls: Calls, workflow_id: str) -> None:
    """Cancel a job whose client has gone."""
    request = llm_pb2.CancelRequest(workflow_id=workflow_id, reason="the client has gone")
    await _try(calls, "Cancel", request)


async def delete(calls: Calls, workflow_id: str) -> None:
    """Delete a job whose answer has been read, or whose client has gone."""
    await _try(calls, "DeleteJob", llm_pb2.DeleteJobRequest(workflow_id=workflow_id))


async def _try(calls: Calls, method: str, request: llm_pb2.CancelRequest | llm_pb2.DeleteJobRequest) -> None:
    try:
        await calls.call(method, request)
    except ApiError as error:
        # Nobody waits for an answer any more.
        _log.warning("%s of job %s has failed: %s", method, request.workflow_id, error)


def _later(last: Ending, message: llm_pb2.StreamStatusResponse) -> Ending:
    """Return the state of a job after a message of its stream."""
    return Ending(
        message.status if message.HasField("status") else last.status,
        message.result if message.HasField("result") else last.result,
    )


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
