"""Items of a batch at a provider whose responses go on without the worker: none does that no attempt continues."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from temporalio.testing import ActivityEnvironment

from batches.chunk_lines import PlacedLine
from batches.splitting import RawLine
from feed.memory import MemoryFeed
from jobs import batches
from jobs.errors import Cancelled, InvalidJob
from llm_pb import batch_pb2, internal_pb2, llm_pb2
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch.chunk_log import ChunkLog
from services.gpu_worker.batch.items import ItemRunner, RunningItem, seat_request
from services.gpu_worker.batch.stops import Stop
from services.gpu_worker.engines.engine import IDLE, Engine, Generation, Output
from tests.support.chunks import BATCH, line
from tests.unit.test_activity import SETTINGS


class Provider:
    """An engine with responses that go on."""

    name = "provider"
    context_tokens = 8192

    def __init__(self, *, fails: bool) -> None:
        self.gpu = llm_pb2.GpuInfo()
        self.dead = asyncio.Event()
        self.begun = asyncio.Event()
        self.abandoned: list[str] = []
        self._fails = fails

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        generation.provider_response.response_id = "resp_1"
        yield Output("a", (0,), 1)
        self.begun.set()
        if self._fails:
            raise InvalidJob("the provider's model refuses to answer")
        await asyncio.Event().wait()

    async def abandon(self, response: internal_pb2.ProviderResponse) -> None:
        self.abandoned.append(response.response_id)

    def load(self) -> Any:
        return IDLE


@pytest.mark.parametrize("fails", [True, False], ids=["failed", "cancelled"])
async def test_the_response_of_an_item_that_ends_early_is_cancelled(*, fails: bool) -> None:
    provider = Provider(fails=fails)
    engine, feed = cast("Engine", provider), MemoryFeed()
    loaded = asyncio.create_task(asyncio.sleep(0))
    meter = MeterProvider().get_meter("test")
    jobs = RunLLMOnGPU(engine, loaded, feed, SETTINGS, "w", meter, trace.NoOpTracer())
    request = internal_pb2.ChunkRequest(batch_id="llmbatch-u-r", count=1, batch=BATCH)
    request.create_time.GetCurrentTime()
    runner = ItemRunner(request, 1, jobs, engine, SETTINGS, "w")
    log = ChunkLog(feed, "chunk", 1, "w")

    async def run() -> batch_pb2.BatchItem:
        data = json.dumps(line(0)).encode()
        parsed = runner.parse(PlacedLine(0, RawLine(0, 0, len(data), data)))
        with jobs.seats.attempt(seat_request(request, 0), item=True) as seat:
            assert seat.ask()
            item = RunningItem(0, seat, log.item(0), log.losses(0))
            item.task = asyncio.create_task(runner.run(item, parsed))
            await provider.begun.wait()
            if not fails:
                stopped = batches.stop_cancelled("the batch was cancelled")
                runner.stop = Stop(Cancelled("cancelled on request"), stopped.error)
                item.task.cancel()
            return await item.task

    ended = await ActivityEnvironment().run(run)
    assert ended.state == (llm_pb2.JOB_STATE_FAILED if fails else llm_pb2.JOB_STATE_CANCELLED)
    assert ended.result.output == "a"
    assert provider.abandoned == ["resp_1"]
