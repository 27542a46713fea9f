"""A batch outlives what dies: each line is in output or errors once, and is read once, whichever process is killed.

`make chaos` kills 20 processes while 50,000 lines run. The ordinary run kills one of each kind.
"""

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from durable_llm import AsyncClient, RetryPolicy
from llm_pb import batch_pb2
from tests.support.batches import to_jsonl
from tests.support.chunks import line
from tests.support.encryption import Keys
from tests.support.files import until
from tests.support.scrapes import scrape
from tests.support.stacks import stack_settings

KINDS: Final = ("gpu-worker", "gateway", "gpu-worker-2", "temporal", "nats")
LINES: Final = int(os.environ.get("CHAOS_LINES", "2000"))
KILLS: Final = int(os.environ.get("CHAOS_BATCH_KILLS", str(len(KINDS))))
TOKENS: Final = 16 if LINES < 50_000 else 64
PATIENT = RetryPolicy(give_up_after=timedelta(minutes=5), connect_timeout=timedelta(minutes=5))
pytestmark = pytest.mark.timeout(900 + LINES // 10)


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("batches")
    keys = Keys(folder)
    worker = {
        **keys.environment,
        "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 400}',
        "GPU_WORKER_MAX_CONCURRENT": "16",
    }
    environment = {
        "gateway": {
            **keys.environment,
            "GATEWAY_HEARTBEAT_TIMEOUT": "PT5S",
            "GATEWAY_RETRY_INTERVAL": "PT0.1S",
            # The workflow has at least four runs.
            "GATEWAY_BATCH_RUN_CHUNKS": "13" if LINES < 50_000 else "100",
            "GATEWAY_BATCH_MANIFEST_CHUNKS": "5" if LINES < 50_000 else "64",
        },
        "gpu-worker": worker,
    }
    services = ("temporal", "nats", "gateway", "gpu-worker")
    async with Stack(stack_settings(folder / "stack"), only=services, environment=environment) as stack:
        second = stack.add("gpu-worker", worker)
        await second.start()
        await second.wait_ready()
        yield stack


async def restart(process: Process) -> None:
    await process.kill()
    await process.start()
    await process.wait_ready()


async def generated(stack: Stack, name: str) -> int:
    """Return the number of tokens that a worker's engine has generated since the worker began."""
    return int((await scrape(stack, name)).total("llm_engine_tokens_total", gen_ai_token_type="output"))


async def test_a_batch_survives_the_sigkill_of_every_process(stack: Stack, tmp_path: Path) -> None:
    path, output = tmp_path / "lines.jsonl", tmp_path / "output.jsonl"
    path.write_bytes(to_jsonl(line(number, max_tokens=TOKENS) for number in range(LINES)))
    made = 0
    async with AsyncClient(stack.address("gateway"), retry=PATIENT) as client:
        started = await client.batches.start(path, user_id="alice", budget={"output_tokens": LINES * TOKENS})
        read: list[int] = []
        used = 0

        async def read_all() -> None:
            nonlocal used
            async for message in client.batches.results(started.batch_id):
                read.extend(item.index for item in message.items)
                used += sum(item.result.metadata.output_tokens for item in message.items)

        def has_read(least: int) -> bool:
            return reading.done() or len(read) > least

        reading = asyncio.create_task(read_all())
        for number, name in enumerate(itertools.islice(itertools.cycle(KINDS), KILLS), 1):
            await until(partial(has_read, number * LINES // (KILLS + 2)))
            if name.startswith("gpu-worker"):
                made += await generated(stack, name)
            await restart(stack.processes[name])
        await reading
        made += sum([await generated(stack, name) for name in KINDS if name.startswith("gpu-worker")])
        status = [status async for status in client.batches.watch(started.batch_id)][-1]
        assert status.state == batch_pb2.BATCH_STATE_SUCCEEDED, status
        assert sorted(read) == list(range(LINES))
        assert (status.counts.total, status.counts.succeeded) == (LINES, LINES)
        await client.files.download(status.output.file_id, output)
    with output.open("rb") as file:
        assert len([*itertools.islice(file, LINES + 1)]) == LINES
    # The budget would have stopped a batch that pays twice for anything.
    assert status.usage.output_tokens == used == LINES * TOKENS
    assert status.usage.wasted_tokens <= used / 1000
    temporal = await Client.connect(stack.address("temporal"))
    query = f"WorkflowId = '{started.batch_id}'"
    runs = [run async for run in temporal.list_workflows(query)]
    assert len(runs) >= 4
    events = sum(run.history_length for run in runs)
    assert events <= max(LINES // 10, 800)
    # What an engine generates between its scrape and its kill is in neither count. A kill costs some 250 tokens.
    assert made - used <= (used / 1000 if LINES >= 50_000 else max(used / 1000, 200 * KILLS))
    sys.stderr.write(f"{KILLS} kills: {made - used} of {used} tokens made again, {events} events in {len(runs)} runs\n")
