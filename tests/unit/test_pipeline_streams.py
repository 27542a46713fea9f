"""What a stream of a pipeline brings while the workflow of the pipeline does not answer."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

from feed.feed import Feed
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from runtime.auth import Caller
from services.gateway import cursor_text
from services.gateway.pipelines.live import LiveSteps
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.pipelines.streams import PipelineStreams
from services.gateway.settings import GatewaySettings
from services.gateway.streams.streams import Streams

ID = "llmpipe-u-1"


class Reader:
    """A pipeline of which each look of this gateway brings the next record, the last one again and again."""

    def __init__(self, *records: internal_pb2.PipelineRecord) -> None:
        self.records = [*records]

    async def describe(self, *_: Any) -> Any:
        async def memo_value(_: str, default: Any = None) -> Any:
            return default

        return SimpleNamespace(id=ID, run_id="a", memo_value=memo_value)

    async def record_of(self, _: Any) -> internal_pb2.PipelineRecord:
        return self.records.pop(0) if len(self.records) > 1 else self.records[0]


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


def messages_of(
    reader: Reader, cursor: internal_pb2.PipelineCursor | None = None
) -> AsyncGenerator[pipeline_pb2.StreamPipelineResponse, None]:
    streams = PipelineStreams(
        cast("PipelineReader", reader),
        cast("LiveSteps", None),
        cast("Streams", None),
        cast("Feed", SilentFeed()),
        GatewaySettings.model_validate({"poll": 0.01}),
    )
    request = pipeline_pb2.StreamPipelineRequest(pipeline_id=ID)
    if cursor is not None:
        request.cursor = cursor_text.encode(ID, cursor)
    answer: Any = SimpleNamespace(sending=lambda _: None, left=lambda: None, room=lambda: 256 * 1024)
    return streams.stream(Caller("", "", frozenset()), request, answer)


async def test_a_reader_with_a_cursor_gets_no_status_from_before_it() -> None:
    """While its present task fails, a pipeline is known to a gateway as it last answered this one."""
    reader = Reader(record_of(5), record_of(5), record_of(12))
    async with aclosing(messages_of(reader, internal_pb2.PipelineCursor(version=9, run_id="a"))) as messages:
        async with asyncio.timeout(10):
            first = await anext(messages)
    assert first.status.root.counts.total == 12


async def test_a_pipeline_that_an_operator_ends_keeps_its_counts_where_it_does_not_answer() -> None:
    ended = internal_pb2.PipelineRecord()
    ended.status.state = llm_pb2.JOB_STATE_CANCELLED
    async with aclosing(messages_of(Reader(record_of(5), ended))) as messages:
        async with asyncio.timeout(10):
            seen = [message.status async for message in messages if message.HasField("status")]
    assert (seen[0].state, seen[0].root.counts.total) == (llm_pb2.JOB_STATE_RUNNING, 5)
    assert (seen[-1].state, seen[-1].root.counts.total) == (llm_pb2.JOB_STATE_CANCELLED, 5)
