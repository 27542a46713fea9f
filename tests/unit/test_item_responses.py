"""Attempts at items of a batch at a provider: what they leave there, and what they say of earlier losses."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from temporalio.testing import ActivityEnvironment

from batches.chunk_lines import PlacedLine
from batches.splitting import RawLine
from feed.memory import MemoryFeed
from jobs import batches
from jobs.errors import Cancelled, EngineFailed, InvalidJob, WorkerShutdown
from llm_pb import batch_pb2, internal_pb2, llm_pb2
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch import items
from services.gpu_worker.batch.chunk_log import ChunkLog
from services.gpu_worker.batch.item_attempt import Pace
from services.gpu_worker.batch.items import ItemRunner, RunningItem, seat_request
from services.gpu_worker.batch.losses import Losses
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


class Flaky(Provider):
    """A provider that fails once, and does not answer the second time."""

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        if self._fails:
            self._fails = False
            raise EngineFailed("the provider is away")
        self.begun.set()
        await asyncio.Event().wait()
        yield Output("a", (0,), 1)


class Limited(Provider):
    """A provider that asks for ten minutes after a token, and says no more."""

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        assert not self.begun.is_set(), "it has asked for ten minutes"
        self.begun.set()
        yield Output("a", (0,), 1)
        error = EngineFailed("the provider answered HTTP 429")
        error.retry_after = timedelta(minutes=10)
        raise error


class Chunk:
    """A chunk of one item, on one worker."""

    def __init__(self, provider: Provider) -> None:
        engine, self.feed = cast("Engine", provider), MemoryFeed()
        loaded = asyncio.create_task(asyncio.sleep(0))
        meter = MeterProvider().get_meter("test")
        self._jobs = RunLLMOnGPU(engine, loaded, self.feed, SETTINGS, "w", meter, trace.NoOpTracer())
        self._request = internal_pb2.ChunkRequest(batch_id="llmbatch-u-r", count=1, batch=BATCH)
        self._request.create_time.GetCurrentTime()
        self.runner = ItemRunner(self._request, 1, self._jobs, engine, SETTINGS, "w", Pace())
        self.log = ChunkLog(self.feed, "chunk", 1, "w")

    async def until_free(self) -> None:
        """Return once the item has no seat, because it waits."""
        await self._jobs.seats.until(lambda: not self._jobs.seats.taken)

    @contextmanager
    def begun(self, losses: Losses) -> Iterator[asyncio.Task[batch_pb2.BatchItem]]:
        """Run the item, with a seat while the context is open. `losses` is what its worker knows of it."""
        data = json.dumps(line(0)).encode()
        parsed = self.runner.parse(PlacedLine(0, RawLine(0, 0, len(data), data)))
        with self._jobs.seats.attempt(seat_request(self._request, 0), item=True) as seat:
            assert seat.ask()
            rest = self.log.rest_of_wait(0)
            item = RunningItem(0, seat, self.log.item(0), losses, rest)
            item.task = asyncio.create_task(self.runner.run(item, parsed))
            yield item.task


@pytest.mark.parametrize("fails", [True, False], ids=["failed", "cancelled"])
async def test_the_response_of_an_item_that_ends_early_is_cancelled(*, fails: bool) -> None:
    provider = Provider(fails=fails)
    chunk = Chunk(provider)

    async def run() -> batch_pb2.BatchItem:
        with chunk.begun(Losses()) as task:
            await provider.begun.wait()
            if not fails:
                stopped = batches.stop_cancelled("the batch was cancelled")
                chunk.runner.stop = Stop(Cancelled("cancelled on request"), stopped.error)
                task.cancel()
            return await task

    ended = await ActivityEnvironment().run(run)
    assert ended.state == (llm_pb2.JOB_STATE_FAILED if fails else llm_pb2.JOB_STATE_CANCELLED)
    assert ended.result.output == "a"
    assert provider.abandoned == ["resp_1"]


async def test_an_item_that_has_failed_by_itself_is_no_suspect_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is not blamed for the workers of before, should this one be lost as well."""
    monkeypatch.setattr(items, "_RETRY_SECONDS", 0)
    provider = Flaky(fails=True)
    chunk = Chunk(provider)

    async def run() -> Losses:
        with chunk.begun(Losses(total=2, in_vain=2)) as task:
            await provider.begun.wait()
            await chunk.log.flush()
            following = ChunkLog(chunk.feed, "chunk", 2, "w")
            await following.take_over({0})
            task.cancel()
            await asyncio.wait({task})
            return following.losses(0)

    assert await ActivityEnvironment().run(run) == Losses(total=1, in_vain=1)


async def test_an_item_that_is_cancelled_in_the_wait_of_an_earlier_worker_keeps_what_that_has_generated() -> None:
    """It has no attempt at the worker that took it over, and no seat there."""
    provider = Limited(fails=True)
    first, second = Chunk(provider), Chunk(provider)

    async def run() -> batch_pb2.BatchItem:
        with first.begun(Losses()) as task:
            await first.until_free()
            first.runner.stop = Stop(WorkerShutdown("the worker was asked to stop"))
            task.cancel()
            await asyncio.wait({task})
        await first.log.flush()
        second.log = ChunkLog(first.feed, "chunk", 2, "w")
        await second.log.take_over({0})
        assert timedelta(minutes=9) < second.log.rest_of_wait(0) <= timedelta(minutes=10)
        with second.begun(Losses()) as task:
            await second.until_free()
            second.runner.stop = Stop(Cancelled("cancelled on request"), batches.stop_cancelled("cancelled").error)
            task.cancel()
            return await task

    ended = await ActivityEnvironment().run(run)
    assert (ended.state, ended.result.output) == (llm_pb2.JOB_STATE_CANCELLED, "a")
    assert [attempt.end for attempt in ended.result.attempts] == [llm_pb2.ATTEMPT_END_FAILED]
    assert ended.result.metadata.worker == "w"
