"""Items of a chunk on their own: what they do with their seats, and what they cost."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from temporalio.testing import ActivityEnvironment

from batches.chunk_lines import PlacedLine
from batches.splitting import RawLine
from feed.memory import MemoryFeed
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch.chunk_log import ChunkLog
from services.gpu_worker.batch.item_attempt import Pace
from services.gpu_worker.batch.items import ItemRunner, RunningItem, seat_request
from services.gpu_worker.batch.losses import Losses
from services.gpu_worker.engines.engine import Engine, EngineConfig, Generation, Output, create_engine
from services.gpu_worker.settings import GpuWorkerSettings
from store.store import ListedObject, StoredObject, StoreUnavailable

SETTINGS = GpuWorkerSettings(engine="simulated", max_concurrent=1)


class _Away:
    """A store that is away."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def of_tenant(self, tenant: str) -> "_Away":
        return self

    def new_name(self, prefix: str) -> str:
        raise NotImplementedError

    async def put(self, name: str, pieces: AsyncIterator[bytes]) -> StoredObject:
        raise NotImplementedError

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    async def delete(self, names: Iterable[str]) -> None:
        raise NotImplementedError

    async def remove_drafts(self, prefix: str, before: datetime) -> None:
        raise NotImplementedError

    async def list(self, prefix: str) -> AsyncGenerator[ListedObject, None]:
        self.asked.set()
        for item in ():
            yield item
        raise StoreUnavailable("the store of the test is away")


class _Charging:
    """The engine, of a provider that says what it has charged; None: it does not."""

    def __init__(self, engine: Engine, charged: int | None) -> None:
        self._engine = engine
        self._charged = charged

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        async with aclosing(self._engine.generate(generation)) as outputs:
            async for output in outputs:
                last = output.finish_reason is not None
                yield replace(output, cost_micros=self._charged) if last else output


class Items:
    """A worker with one seat that runs one item."""

    def __init__(self, engine: Engine, store: Any = None, **of_chunk: Any) -> None:
        meter, loaded = MeterProvider().get_meter("test"), asyncio.create_task(asyncio.sleep(0))
        self._feed = MemoryFeed()
        self.jobs = RunLLMOnGPU(engine, loaded, self._feed, SETTINGS, "w", meter, trace.NoOpTracer(), store)
        batch = batch_pb2.BatchRequest(user_id="u", request_id="r")
        self._request = internal_pb2.ChunkRequest(batch_id="llmbatch-u-r", count=1, batch=batch, **of_chunk)
        self._runner = ItemRunner(self._request, 1, self.jobs, engine, SETTINGS, "w", Pace())
        self._log = ChunkLog(self._feed, "chunk", 1, "w")

    async def run(self, **fields: Any) -> batch_pb2.BatchItem:
        """Run the item of a line with these fields, which has a seat."""
        data = json.dumps({"request_id": "1", "model": "docstrings", **fields}).encode()
        line = self._runner.parse(PlacedLine(0, RawLine(0, 0, len(data), data)))
        with self.jobs.seats.attempt(seat_request(self._request, 0), item=True) as seat:
            assert seat.ask()
            item = RunningItem(0, seat, self._log.item(0), Losses())
            return await self._runner.run(item, line)

    async def losses(self) -> Losses:
        """Return what the next attempt finds if this worker is lost as another item begins."""
        await self._log.flush()
        following = ChunkLog(self._feed, "chunk", 2, "w")
        await following.take_over({0})
        return following.losses(0)


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[Engine]:
    engine = create_engine("simulated", EngineConfig("", 1, {"tokens_per_second": 2000}))
    await engine.start()
    yield engine
    await engine.close()


async def test_an_item_that_waits_for_the_store_of_its_prompt_has_no_seat(engine: Engine) -> None:
    """Whoever needs the seat meanwhile gets it, and need not wait for the store."""
    store = _Away()
    items = Items(engine, store)

    async def run() -> None:
        file = {"file_id": f"output-{64 * '0'}", "sha256": f"{43 * 'A'}=", "size_bytes": 1}
        running = asyncio.create_task(items.run(prompt_file=file))
        await store.asked.wait()
        urgent = internal_pb2.RunRequest(job=llm_pb2.JobRequest(job_class=common_pb2.JOB_CLASS_HIGH))
        with items.jobs.seats.attempt(urgent) as other:
            assert other.ask()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()

    await ActivityEnvironment().run(run)


@pytest.mark.parametrize("charged", [None, 0, 7])
async def test_what_a_provider_has_charged_for_an_item_comes_before_the_price(
    engine: Engine, charged: int | None
) -> None:
    price = llm_pb2.ModelPrice(currency="EUR", prompt_micros_per_million=0, output_micros_per_million=2_000_000)
    items = Items(cast("Engine", _Charging(engine, charged)), price=price)

    async def run() -> batch_pb2.BatchItem:
        return await items.run(prompt="Say something.", params={"max_tokens": 10})

    item = await ActivityEnvironment().run(run)
    assert item.result.metadata.output_tokens == 10
    assert item.result.metadata.cost_micros == (20 if charged is None else charged)


class _Noting:
    """The engine, with what it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.intervals: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        self.intervals.append(generation.stream_interval)
        async with aclosing(self._engine.generate(generation)) as outputs:
            async for output in outputs:
                yield output


async def test_the_engine_may_join_the_tokens_of_a_tenth_of_a_second(engine: Engine) -> None:
    """As fast as the last item was. How fast the engine is, no item says before the first one has ended."""
    noting = _Noting(engine)

    async def run() -> batch_pb2.BatchItem:
        items = Items(noting)
        ended = await items.run(prompt="Say something.", params={"max_tokens": 100})
        await items.run(prompt="Say something.", params={"max_tokens": 100})
        return ended

    ended = await ActivityEnvironment().run(run)
    pace = Pace()
    pace.note(ended.result.metadata)
    assert noting.intervals == [1, pace.held_back]


@pytest.mark.parametrize(("tokens", "joined"), [(0, 1), (1, 1), (3, 3), (11, 4), (39, 4), (50, 5), (400, 40)])
def test_a_slow_engine_joins_a_few_tokens_of_at_most_a_second(tokens: int, joined: int) -> None:
    """Each Output costs the worker as much as several tokens cost it."""
    pace, metadata = Pace(), llm_pb2.ResultMetadata(output_tokens=10 * tokens)
    metadata.engine_time.FromSeconds(10)
    pace.note(metadata)
    assert pace.held_back == joined


async def test_an_item_that_has_ended_is_not_blamed_for_what_another_does_to_its_worker(engine: Engine) -> None:
    """It was blamed again in each attempt that found all of its tokens, for it ended before it was durable."""
    items = Items(engine)

    async def run() -> Losses:
        await items.run(prompt="Say something.", params={"max_tokens": 10})
        return await items.losses()

    assert await ActivityEnvironment().run(run) == Losses()
