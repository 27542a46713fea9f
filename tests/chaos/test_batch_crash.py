"""A batch outlives what dies: each line is in output or errors once, and is read once, whichever process is killed."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from deploy.local.process import Process
from deploy.local.stack import Stack
from durable_llm import AsyncClient, RetryPolicy
from llm_pb import batch_pb2
from tests.support.batches import by_index, lines_of, to_jsonl
from tests.support.encryption import Keys
from tests.support.files import until
from tests.support.stacks import stack_settings

pytestmark = pytest.mark.timeout(900)
LINES = 2000
KILLED = ("gpu-worker", "gateway", "gpu-worker", "temporal", "gpu-worker", "nats", "gateway")
PATIENT = RetryPolicy(give_up_after=timedelta(minutes=5), connect_timeout=timedelta(minutes=5))


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("batches")
    keys = Keys(folder)
    environment = {
        "gateway": {**keys.environment, "GATEWAY_HEARTBEAT_TIMEOUT": "PT10S", "GATEWAY_RETRY_INTERVAL": "PT0.1S"},
        "gpu-worker": {
            **keys.environment,
            "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 400}',
            "GPU_WORKER_MAX_CONCURRENT": "16",
        },
    }
    services = ("temporal", "nats", "gateway", "gpu-worker")
    async with Stack(stack_settings(folder / "stack"), only=services, environment=environment) as stack:
        yield stack


async def restart(process: Process) -> None:
    await process.kill()
    await process.start()
    await process.wait_ready()


async def test_a_batch_survives_the_sigkill_of_every_process(stack: Stack, tmp_path: Path) -> None:
    path, output = tmp_path / "lines.jsonl", tmp_path / "output.jsonl"
    path.write_bytes(to_jsonl(lines_of(LINES, model="docstrings")))
    async with AsyncClient(stack.address("gateway"), retry=PATIENT) as client:
        started = await client.batches.start(path, user_id="alice")
        items: list[batch_pb2.BatchItem] = []

        async def read() -> None:
            async for message in client.batches.results(started.batch_id):
                items.extend(message.items)

        def has_read(least: int) -> bool:
            return reading.done() or len(items) > least

        reading = asyncio.create_task(read())
        for number, name in enumerate(KILLED, 1):
            await until(partial(has_read, number * LINES // (len(KILLED) + 2)))
            await restart(stack.processes[name])
        await reading
        statuses = [status async for status in client.batches.watch(started.batch_id)]
        status = statuses[-1]
        assert status.state == batch_pb2.BATCH_STATE_SUCCEEDED, status
        assert sorted(by_index(items)) == list(range(LINES))
        assert (status.counts.total, status.counts.succeeded) == (LINES, LINES)
        await client.files.download(status.output.file_id, output)
        with output.open("rb") as file:
            assert len([*itertools.islice(file, LINES + 1)]) == LINES
        used = sum(item.result.metadata.output_tokens for item in items)
        assert status.usage.output_tokens == used
        assert status.usage.wasted_tokens <= used / 1000
