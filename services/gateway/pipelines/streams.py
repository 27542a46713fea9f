"""StreamPipeline: the tree of a pipeline and the output of followed steps, as one stream with one cursor."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Final, NamedTuple

from feed.feed import Feed
from jobs.field_rules import Violation
from jobs.pipelines import matches
from jobs.resume_token import ResumeToken
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from runtime.answers import Answer
from runtime.auth import Caller
from services.gateway import cursor_text
from services.gateway.errors import JobNotFound, invalid, shutting_down
from services.gateway.job_traces import link_call
from services.gateway.pipelines.follower import PipelineFollower
from services.gateway.pipelines.live import Live, LiveSteps, with_live
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.pipelines.sent_steps import SentSteps
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings
from services.gateway.streams.streams import Streams
from services.gateway.streams.watchers import Watchers

_MAX_STEPS: Final = 64
"""Maximum number of steps whose output one stream brings."""
_OVERHEAD: Final = 8 * 1024
"""Bytes of a message without steps and output: status and cursor."""
_LEAST: Final = 4 * 1024


class PipelineStreams:
    """The StreamPipeline calls that this gateway serves."""

    def __init__(
        self, reader: PipelineReader, live: LiveSteps, jobs: Streams, feed: Feed, settings: GatewaySettings
    ) -> None:
        """`jobs` are the watches of jobs, of which steps are some."""
        self._reader = reader
        self._live = live
        self._jobs = jobs
        self._feed = feed
        self._poll = settings.poll.total_seconds()
        self._keepalive = settings.keepalive.total_seconds()
        self._followers: dict[str, PipelineFollower] = {}
        self._stopping = asyncio.Event()
        self._watchers = Watchers(settings, "pipelines")

    def close(self) -> None:
        """End every stream with UNAVAILABLE. Its client continues with another gateway, or with this one later."""
        self._stopping.set()

    async def stream(
        self, caller: Caller, request: pipeline_pb2.StreamPipelineRequest, answer: Answer
    ) -> AsyncGenerator[pipeline_pb2.StreamPipelineResponse, None]:
        """Yield the messages of StreamPipeline. Raises ApiError, RPCError, KeysUnavailable."""
        cursor = internal_pb2.PipelineCursor(version=-1)
        if request.cursor:
            try:
                cursor = cursor_text.decode(request.pipeline_id, request.cursor, internal_pb2.PipelineCursor)
            except cursor_text.BadCursor as error:
                raise invalid([Violation("cursor", f"must be a cursor of this pipeline: {error}")]) from None
        async with self._watchers.acquired(caller), self._joined(caller, request.pipeline_id) as follower:
            reading = _Reading(self._jobs, follower, request, cursor, answer)
            try:
                async with aclosing(reading.messages(self._stopping, self._keepalive)) as messages:
                    async for message in messages:
                        message.cursor = cursor_text.encode(request.pipeline_id, reading.cursor())
                        answer.sending(message.ByteSize())
                        # The yield returns once gRPC has sent the message.
                        yield message
                        answer.left()
            finally:
                await reading.close()

    @asynccontextmanager
    async def _joined(self, caller: Caller, pipeline_id: str) -> AsyncIterator[PipelineFollower]:
        description = await self._reader.describe(caller, pipeline_id)
        await link_call(description)
        follower, run_id = self._followers.get(pipeline_id), description.run_id
        if follower is None or follower.over or follower.run_id != run_id:
            follower = PipelineFollower(pipeline_id, run_id, self._reader, self._live, self._feed, self._poll)
            self._followers[pipeline_id] = follower
        follower.watchers += 1
        try:
            yield follower
        finally:
            follower.watchers -= 1
            if not follower.watchers:
                if self._followers.get(pipeline_id) is follower:
                    del self._followers[pipeline_id]
                await follower.close()


class _Piece(NamedTuple):
    """Output of a followed step that waits to be sent."""

    number: int
    path: str
    delta: llm_pb2.OutputDelta
    resume_token: str
    sent: asyncio.Event


class _Reading:
    """One reader of a pipeline."""

    def __init__(
        self,
        jobs: Streams,
        follower: PipelineFollower,
        request: pipeline_pb2.StreamPipelineRequest,
        cursor: internal_pb2.PipelineCursor,
        answer: Answer,
    ) -> None:
        self._jobs = jobs
        self._follower = follower
        self._follow = [*request.follow]
        self._is_followed: dict[int, bool] = {}
        """Whether each node is followed, by its number: a thousand of them are looked at with every message."""
        self._answer = answer
        # Numbers and versions are of one run. Its outputs come again after a cursor of an earlier one.
        self._again = cursor.run_id not in ("", follower.run_id)
        self._before = cursor
        self._version = -1 if self._again else cursor.version
        self._places = {place.number: place for place in (() if self._again else cursor.places)}
        self._sent = SentSteps()
        self._live: Live = {}
        self._changes_seen = -1
        self._look = follower.looks
        if self._version > follower.version:
            follower.ask()
        self._is_over = False
        self._pieces: deque[_Piece] = deque()
        self._news = asyncio.Event()
        self._pumps: dict[int, asyncio.Task[None]] = {}

    def cursor(self) -> internal_pb2.PipelineCursor:
        """Return the place behind the last message."""
        cursor = internal_pb2.PipelineCursor(
            version=self._version, places=self._places.values(), run_id=self._follower.run_id
        )
        self._sent.note(cursor)
        return cursor

    async def close(self) -> None:
        """Stop reading outputs."""
        for pump in self._pumps.values():
            pump.cancel()
        await asyncio.gather(*self._pumps.values(), return_exceptions=True)

    async def messages(
        self, stopping: asyncio.Event, keepalive: float
    ) -> AsyncGenerator[pipeline_pb2.StreamPipelineResponse, None]:
        """Yield the messages but for their cursors. `keepalive` is in seconds."""
        follower, now = self._follower, asyncio.get_running_loop().time
        due = now() + keepalive
        while not self._is_over:
            if stopping.is_set():
                raise shutting_down()
            follower.raise_failure()
            changed = follower.changed
            self._news.clear()
            for message in self._ready():
                yield message
                due = now() + keepalive
            if changed is follower.changed and not self._is_over:
                await self._wait(changed, stopping, due - now())
            # The follower has news whenever it has asked, and this reader may have none of them.
            if now() >= due and not self._is_over:
                yield pipeline_pb2.StreamPipelineResponse()
                due = now() + keepalive

    def _ready(self) -> Iterator[pipeline_pb2.StreamPipelineResponse]:
        """Yield what there is for the reader now, at last the end."""
        follower = self._follower
        if self._waits_for_look():
            return
        self._start_pumps()
        if follower.changes != self._changes_seen:
            yield from self._changes()
        while self._pieces:
            yield self._next_delta()
        if self._has_all_outputs() and follower.ended:
            last = pipeline_pb2.StreamPipelineResponse(status=follower.status)
            if follower.result is not None:
                last.result.CopyFrom(follower.result)
            self._is_over = True
            yield last

    def _waits_for_look(self) -> bool:
        """Return whether the reader may have seen more at another gateway than this one knows yet."""
        follower = self._follower
        if self._changes_seen >= 0 or follower.ended:
            return False
        # Where the workflow has answered since, and knows less, a crash has taken back what the reader has.
        return follower.version < 0 or (follower.version < self._version and follower.answered <= self._look)

    async def _wait(self, changed: asyncio.Event, stopping: asyncio.Event, seconds: float) -> None:
        """Wait for something new, for so long at most."""
        waits = [asyncio.ensure_future(event.wait()) for event in (changed, self._news, stopping)]
        try:
            await asyncio.wait(waits, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _changes(self) -> Iterator[pipeline_pb2.StreamPipelineResponse]:
        """Yield the status and the nodes that the reader does not have, in messages that have room."""
        follower, version = self._follower, self._follower.version
        if self._changes_seen < 0:
            self._sent = SentSteps.of_cursor(self._before, {} if self._again else follower.nodes)
        if rewind := not self._sent.are_among(follower.nodes):
            self._sent = SentSteps()
        self._changes_seen = follower.changes
        # Who gets a final status has the last message: the result comes with it.
        message = pipeline_pb2.StreamPipelineResponse(status=None if follower.ended else follower.status, rewind=rewind)
        size = 0
        known, self._live = self._live, follower.live
        for node in follower.nodes.values():
            if self._sent.has(node) and self._live.get(node.number) == known.get(node.number):
                continue
            step = with_live(node, self._live)
            if message.steps and size + step.ByteSize() > self._room():
                yield message
                message, size = pipeline_pb2.StreamPipelineResponse(), 0
            message.steps.append(step)
            size += step.ByteSize()
            self._sent.add(node)
        # Before the last of them a reader that comes back begins with all of them again.
        self._version = version
        if message.ByteSize():
            yield message

    def _next_delta(self) -> pipeline_pb2.StreamPipelineResponse:
        piece = self._pieces.popleft()
        self._place(piece.number).resume_token = piece.resume_token
        piece.sent.set()
        return pipeline_pb2.StreamPipelineResponse(delta=pipeline_pb2.StepDelta(path=piece.path, delta=piece.delta))

    def _has_all_outputs(self) -> bool:
        """Return whether every output was sent. Raises the error that has ended one."""
        for pump in self._pumps.values():
            if pump.done():
                pump.result()
        return not self._pieces and all(pump.done() for pump in self._pumps.values())

    def _start_pumps(self) -> None:
        nodes = self._follower.nodes
        # Who comes back goes on with the steps that were begun, whichever have come first now.
        for number in [*self._places, *nodes] if self._follow else ():
            if len(self._pumps) >= _MAX_STEPS:
                return
            node = nodes.get(number)
            if node is not None and number not in self._pumps and node.step.workflow_id and self._follows(node):
                self._pumps[number] = asyncio.create_task(self._pump(node))
                self._pumps[number].add_done_callback(lambda _: self._news.set())

    def _follows(self, node: internal_pb2.PipelineNode) -> bool:
        found = self._is_followed.get(node.number)
        if found is None:
            found = any(matches(node.step.path, pattern) for pattern in self._follow)
            self._is_followed[node.number] = found
        return found

    async def _pump(self, node: internal_pb2.PipelineNode) -> None:
        """Read the output of a step, one piece ahead of the reader."""
        place = self._place(node.number)
        if place.done:
            return
        first = self._again
        job_id, token = node.step.workflow_id, ResumeToken.parse(place.resume_token)
        try:
            async with (
                self._jobs.joined(gateway_for(job_id), job_id) as watch,
                aclosing(watch.messages(0, self._room, token)) as messages,
            ):
                async for message in messages:
                    if message.HasField("delta"):
                        sent, delta = asyncio.Event(), llm_pb2.OutputDelta()
                        delta.CopyFrom(message.delta)
                        delta.rewind, first = delta.rewind or first, False
                        self._pieces.append(_Piece(node.number, node.step.path, delta, message.resume_token, sent))
                        self._news.set()
                        await sent.wait()
        except JobNotFound:
            # It was deleted: there is no output any more.
            pass
        place.done = True

    def _place(self, number: int) -> internal_pb2.PipelinePlace:
        return self._places.setdefault(number, internal_pb2.PipelinePlace(number=number))

    def _room(self) -> int:
        return max(self._answer.room() - _OVERHEAD, _LEAST)
