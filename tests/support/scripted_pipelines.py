"""Streams of pipelines whose workflow, feed and jobs are scripted."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

from feed.feed import Feed
from jobs.resume_token import ResumeToken
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from runtime.auth import Caller
from services.gateway import cursor_text
from services.gateway.pipelines.live import LiveSteps
from services.gateway.pipelines.reader import Look, PipelineReader
from services.gateway.pipelines.streams import PipelineStreams
from services.gateway.settings import GatewaySettings
from services.gateway.streams.streams import Streams

ID = "llmpipe-u-1"


class Reader:
    """A pipeline of which each look of this gateway brings the next record, the last one again and again."""

    def __init__(self, *records: internal_pb2.PipelineRecord, answered: bool = False) -> None:
        """`answered`: whether the workflow answers, and this gateway does not only remember the records."""
        self.records, self.answered = [*records], answered

    async def describe(self, *_: Any) -> Any:
        async def memo_value(_: str, default: Any = None) -> Any:
            return default

        return SimpleNamespace(id=ID, run_id="a", memo_value=memo_value)

    async def look(self, _: Any) -> Look:
        record = self.records.pop(0) if len(self.records) > 1 else self.records[0]
        return Look(record, self.answered)


def record_of(version: int) -> internal_pb2.PipelineRecord:
    """Return the record of a pipeline with as many steps as its version."""
    record = internal_pb2.PipelineRecord(version=version)
    record.status.state = llm_pb2.JOB_STATE_RUNNING
    record.status.root.counts.total = version
    return record


class SilentFeed:
    """A feed that is away."""

    available = False

    async def read(self, *_: Any) -> None:
        await asyncio.Event().wait()


class Outputs:
    """The outputs of jobs, which all go on for ever: a byte each time that one is read."""

    @asynccontextmanager
    async def joined(self, _: Any, job_id: str) -> AsyncIterator[Any]:
        async def messages(_: int, __: Any, token: ResumeToken | None) -> AsyncGenerator[Any, None]:
            for offset in itertools.count(token.offset if token is not None else 0):
                message = llm_pb2.StreamStatusResponse(resume_token=str(ResumeToken(offset + 1, "0" * 16)))
                message.delta.offset, message.delta.text = offset, "x"
                yield message

        yield SimpleNamespace(messages=messages)


class EndingFeed:
    """A feed that says at once that the pipeline is about to end."""

    available = True

    async def read(self, _: str, take: Any) -> None:
        take(internal_pb2.FeedRecord(job_ending=internal_pb2.JobEnding()))


def messages_of(
    reader: Reader,
    cursor: internal_pb2.PipelineCursor | None = None,
    *,
    follow: str = "",
    after: str = "",
    feed: Any = None,
    poll: float = 0.01,
    keepalive: float = 15,
) -> AsyncGenerator[pipeline_pb2.StreamPipelineResponse, None]:
    streams = PipelineStreams(
        cast("PipelineReader", reader),
        cast("LiveSteps", None),
        cast("Streams", Outputs()),
        cast("Feed", feed or SilentFeed()),
        GatewaySettings.model_validate({"poll": poll, "keepalive": keepalive}),
    )
    request = pipeline_pb2.StreamPipelineRequest(pipeline_id=ID, follow=[follow] if follow else [], cursor=after)
    if cursor is not None:
        request.cursor = cursor_text.encode(ID, cursor)
    answer: Any = SimpleNamespace(sending=lambda _: None, left=lambda: None, room=lambda: 256 * 1024)
    return streams.stream(Caller("", "", frozenset()), request, answer)
