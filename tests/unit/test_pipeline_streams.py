"""What a stream of a pipeline begins with at another gateway."""

import asyncio
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
    """A pipeline of which this gateway at first knows an earlier version, as while its present task fails."""

    def __init__(self) -> None:
        self.versions = [5, 5, 12]

    async def describe(self, *_: Any) -> Any:
        async def memo_value(_: str, default: Any = None) -> Any:
            return default

        return SimpleNamespace(id=ID, run_id="a", memo_value=memo_value)

    async def record_of(self, _: Any) -> internal_pb2.PipelineRecord:
        version = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
        record = internal_pb2.PipelineRecord(version=version)
        record.status.state = llm_pb2.JOB_STATE_RUNNING
        record.status.root.counts.total = version
        return record


class SilentFeed:
    """A feed that is away."""

    available = False

    async def read(self, *_: Any) -> None:
        await asyncio.Event().wait()


async def test_a_reader_with_a_cursor_gets_no_status_from_before_it() -> None:
    settings = GatewaySettings.model_validate({"poll": 0.01})
    streams = PipelineStreams(
        cast("PipelineReader", Reader()),
        cast("LiveSteps", None),
        cast("Streams", None),
        cast("Feed", SilentFeed()),
        settings,
    )
    cursor = cursor_text.encode(ID, internal_pb2.PipelineCursor(version=9, run_id="a"))
    request = pipeline_pb2.StreamPipelineRequest(pipeline_id=ID, cursor=cursor)
    answer: Any = SimpleNamespace(sending=lambda _: None, left=lambda: None, room=lambda: 256 * 1024)
    messages = streams.stream(Caller("", "", frozenset()), request, answer)
    async with asyncio.timeout(10):
        first = await anext(messages)
    assert first.status.root.counts.total == 12
    await messages.aclose()
