"""An item of a batch waits as long as its provider asks for, also where the worker ends meanwhile.

What is left of the wait goes on at the next worker, as Temporal keeps the wait of a job.
"""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs import batches
from llm_pb import batch_pb2, internal_pb2, llm_pb2
from tests.stack.test_openai_engine import piece, provider, streaming
from tests.support.chunks import PATIENCE, ChunkStack, chunk_stack, ended, line
from tests.support.files import until
from tests.support.readiness import ask
from tests.support.stacks import stack_settings

CANCELLED = llm_pb2.JOB_STATE_CANCELLED
SUCCEEDED = llm_pb2.JOB_STATE_SUCCEEDED
FAILED = llm_pb2.ATTEMPT_END_FAILED
LONG = "600"
"""Seconds that no test waits."""


@pytest.fixture(scope="module")
async def chunks(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ChunkStack]:
    settings = stack_settings(tmp_path_factory.mktemp("chunks"))
    async with Stack(settings, only=("temporal", "nats")) as stack, chunk_stack(stack) as running:
        yield running


class Limited:
    """A provider that asks for a wait before it completes some of the prompts, each time or the first time."""

    def __init__(self, *prompts: str, seconds: str, once: bool = False) -> None:
        self.asked: list[tuple[str, float]] = []
        """The prompts that it was asked for, each with its time."""
        self.held = asyncio.Event()
        """Set to have it complete the prompt `Hold.`"""
        self._prompts = prompts
        self._seconds = seconds
        self._once = once
        self._complete = streaming(piece("Said.", "stop"))

    async def answer(self, request: web.Request) -> web.Response:
        """Answer a completion."""
        prompt = (await request.json())["messages"][-1]["content"]
        again = bool(self.times(prompt))
        self.asked.append((prompt, time.monotonic()))
        if prompt in self._prompts and not (self._once and again):
            return web.json_response({}, status=429, headers={"Retry-After": self._seconds})
        if prompt == "Hold.":
            await self.held.wait()
        response: web.Response = await self._complete(request)
        return response

    def times(self, prompt: str) -> list[float]:
        """Return when it was asked for the prompt."""
        return [at for asked, at in self.asked if asked == prompt]


@asynccontextmanager
async def worker(chunks: ChunkStack, address: str, **options: Any) -> AsyncIterator[Process]:
    """Run a worker of the provider with four seats while the context is open."""
    engine = {
        "GPU_WORKER_ENGINE": "openai",
        "GPU_WORKER_ENGINE_OPTIONS": json.dumps({"base_url": f"http://{address}/v1", "context_tokens": 8192}),
    }
    process = await chunks.worker(seats=4, **engine, **options)
    try:
        yield process
    finally:
        await process.terminate()


async def until_waiting(chunks: ChunkStack, handle: Any, *, attempt: int, items: int, done: int = 0) -> None:
    """Return once an attempt at the chunk has so many items, and so many are durable.

    Those that are durable were begun after those that wait.
    """

    def waits(result: internal_pb2.ChunkResult, _: int) -> bool:
        return result.attempts >= attempt and result.counts.running == items and batches.done_count(result) == done

    await chunks.until(handle, waits)


def failures(item: batch_pb2.BatchItem) -> list["llm_pb2.AttemptEnd.ValueType"]:
    return [attempt.end for attempt in item.result.attempts]


@pytest.mark.parametrize("ends", ["terminate", "kill"])
async def test_the_rest_of_a_wait_goes_on_at_the_next_worker(chunks: ChunkStack, ends: str) -> None:
    limited = Limited("Say 0.", seconds="15", once=True)
    (request,) = await chunks.requests([line(number) for number in range(6)])
    async with provider(limited.answer) as address:
        handle = await chunks.start(request)
        async with worker(chunks, address) as first:
            await until_waiting(chunks, handle, attempt=1, items=1, done=5)
            await (first.kill() if ends == "kill" else first.terminate())
        async with worker(chunks, address):
            result = await ended(handle)
    items = await chunks.items(result)
    assert {(item.state, item.result.output) for item in items.values()} == {(SUCCEEDED, "Said.")}
    assert failures(items[0]) == [FAILED, llm_pb2.ATTEMPT_END_FINISHED]
    asked, again = limited.times("Say 0.")
    # The clock of the log has the first one's end, the provider's clock its begin.
    assert again - asked >= 14.9
    assert result.attempts >= 2


async def test_no_roll_out_uses_up_the_tries_of_items_that_wait(chunks: ChunkStack) -> None:
    """And at the last worker a job, another chunk and a cancel do not wait for them."""
    limited = Limited("Say 0.", "Say 1.", seconds=LONG)
    (request,) = await chunks.requests([line(number) for number in range(4)])
    (other,) = await chunks.requests([line(0, "Be another.")])
    async with provider(limited.answer) as address:
        handle = await chunks.start(request)
        for attempt in (1, 2, 3):
            async with worker(chunks, address) as process:
                await until_waiting(chunks, handle, attempt=attempt, items=2, done=2)
                if attempt < 3:
                    await process.terminate()
                    continue
                async with asyncio.timeout(PATIENCE):
                    await (await chunks.interactive(4)).result()
                (beside,) = await chunks.run([other])
                assert beside.counts.succeeded == 1
                await handle.cancel()
                result = await ended(handle)
    items = await chunks.items(result)
    assert [items[number].state for number in range(4)] == [CANCELLED, CANCELLED, SUCCEEDED, SUCCEEDED]
    assert [failures(items[number]) for number in (0, 1)] == 2 * [[FAILED]]
    assert [len(limited.times(f"Say {number}.")) for number in range(4)] == 4 * [1]


async def test_a_worker_does_not_stay_for_items_that_only_wait(chunks: ChunkStack) -> None:
    limited = Limited("Say 0.", seconds=LONG)
    (request,) = await chunks.requests([line(number) for number in range(2)])
    async with provider(limited.answer) as address:
        handle = await chunks.start(request)
        async with worker(chunks, address, GPU_WORKER_SHUTDOWN_GRACE="PT1H") as process:
            await until_waiting(chunks, handle, attempt=1, items=1, done=1)
            process.signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await process.wait() == 0
        await handle.terminate()


async def test_a_worker_stays_for_the_items_that_run(chunks: ChunkStack) -> None:
    """And goes once they have ended, whatever others wait for."""
    limited = Limited("Say 0.", seconds=LONG)
    (request,) = await chunks.requests([line(0), line(1, "Hold."), line(2)])
    async with provider(limited.answer) as address:
        handle = await chunks.start(request)
        async with worker(chunks, address, GPU_WORKER_SHUTDOWN_GRACE="PT1H") as process:
            await until_waiting(chunks, handle, attempt=1, items=2, done=1)
            process.signal(signal.SIGTERM)

            async def leaves(name: str = process.name) -> bool:
                return not (await ask(chunks.stack, name, "/readyz")).body["ready"]

            await until(leaves)
            limited.held.set()
            async with asyncio.timeout(60):
                assert await process.wait() == 0
        async with worker(chunks, address):
            await until_waiting(chunks, handle, attempt=2, items=1, done=2)
            await handle.cancel()
            result = await ended(handle)
    items = await chunks.items(result)
    assert [items[number].state for number in range(3)] == [CANCELLED, SUCCEEDED, SUCCEEDED]
    assert len(limited.asked) == 3


async def test_a_suspect_that_waits_holds_up_no_other(chunks: ChunkStack) -> None:
    """A worker runs one suspect at a time. One that has failed by itself is none any more."""
    limited, killed, asked = Limited("Say 0.", seconds=LONG), asyncio.Event(), []

    async def answer(request: web.Request) -> web.Response:
        if not killed.is_set():
            asked.append(request)
            await killed.wait()
        return await limited.answer(request)

    (request,) = await chunks.requests([line(number) for number in range(4)])
    async with provider(answer) as address:
        handle = await chunks.start(request)
        async with worker(chunks, address) as first:
            await until(lambda: len(asked) == 4)
            await first.kill()
        killed.set()
        async with worker(chunks, address):
            await until_waiting(chunks, handle, attempt=2, items=1, done=3)
            await handle.cancel()
            result = await ended(handle)
    items = await chunks.items(result)
    assert [items[number].state for number in range(4)] == [CANCELLED, SUCCEEDED, SUCCEEDED, SUCCEEDED]
