"""Items of a chunk on their own: what they do with their seats."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import datetime

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from temporalio.testing import ActivityEnvironment

from batches.chunk_lines import PlacedLine
from batches.splitting import RawLine
from feed.memory import MemoryFeed
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch.chunk_log import ChunkLog
from services.gpu_worker.batch.items import ItemRunner, RunningItem, seat_request
from services.gpu_worker.batch.losses import Losses
from services.gpu_worker.engines.engine import EngineConfig, create_engine
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


async def test_an_item_that_waits_for_the_store_of_its_prompt_has_no_seat() -> None:
    """Whoever needs the seat meanwhile gets it, and need not wait for the store."""
    store, feed = _Away(), MemoryFeed()
    engine, meter = create_engine("simulated", EngineConfig("", 1, {})), MeterProvider().get_meter("test")
    loaded = asyncio.create_task(asyncio.sleep(0))
    jobs = RunLLMOnGPU(engine, loaded, feed, SETTINGS, "w", meter, trace.NoOpTracer(), store)
    request = internal_pb2.ChunkRequest(
        batch_id="llmbatch-u-r", count=1, batch=batch_pb2.BatchRequest(user_id="u", request_id="r")
    )
    runner = ItemRunner(request, 1, jobs, engine, SETTINGS, "w")
    file = {"file_id": f"output-{64 * '0'}", "sha256": f"{43 * 'A'}=", "size_bytes": 1}
    data = json.dumps({"request_id": "1", "model": "docstrings", "prompt_file": file}).encode()
    line = runner.parse(PlacedLine(0, RawLine(0, 0, len(data), data)))

    async def run() -> None:
        with jobs.seats.attempt(seat_request(request, 0), item=True) as seat:
            assert seat.ask()
            log = ChunkLog(feed, "chunk", 1, "w").item(0)
            running = asyncio.create_task(runner.run(RunningItem(0, seat, log, Losses()), line))
            await store.asked.wait()
            urgent = internal_pb2.RunRequest(job=llm_pb2.JobRequest(job_class=common_pb2.JOB_CLASS_HIGH))
            with jobs.seats.attempt(urgent) as other:
                assert other.ask()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert running.cancelled()

    await ActivityEnvironment().run(run)
