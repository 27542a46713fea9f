"""RunBatchChunk: the items of a chunk run side by side, each once, whatever happens to workers, store and feed.

The output of an item that was disturbed is compared with that of the same job undisturbed.
"""

import asyncio
import itertools
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from aiohttp import web
from temporalio.client import WorkflowExecutionStatus

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs import batches
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from services.gpu_worker.engines.simulated import answer, decode
from tests.stack.test_openai_engine import piece, provider, streaming
from tests.support.chunks import PATIENCE, ChunkStack, chunk_stack, ended, line
from tests.support.files import until
from tests.support.jobs import unpack
from tests.support.scrapes import scrape
from tests.support.stacks import stack_settings

SUCCEEDED = llm_pb2.JOB_STATE_SUCCEEDED


@pytest.fixture(scope="module")
async def chunks(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ChunkStack]:
    settings = stack_settings(tmp_path_factory.mktemp("chunks"))
    async with Stack(settings, only=("temporal", "nats")) as stack, chunk_stack(stack) as running:
        yield running


@asynccontextmanager
async def worker(chunks: ChunkStack, **options: Any) -> AsyncIterator[Process]:
    process = await chunks.worker(**options)
    try:
        yield process
    finally:
        if process.running:
            await process.terminate()


def expected(sent: dict[str, Any]) -> str:
    """Return the output of a line undisturbed."""
    params = llm_pb2.SamplingParams(max_tokens=sent["params"]["max_tokens"])
    ids = itertools.islice(answer(sent["prompt"], params, None), params.max_tokens)
    # A character that was cut is no text.
    return decode(list(ids)).rstrip("\ufffd")


def assert_whole(items: dict[int, batch_pb2.BatchItem], lines: list[dict[str, Any]]) -> None:
    """Assert that every line has succeeded, byte for byte."""
    assert sorted(items) == list(range(len(lines)))
    for index, sent in enumerate(lines):
        item = items[index]
        assert (item.custom_id, item.state) == (sent["request_id"], SUCCEEDED), item
        assert item.result.output == expected(sent)
        assert item.result.metadata.output_tokens == sent["params"]["max_tokens"]


def has_done(items: int, result: internal_pb2.ChunkResult, _: int) -> bool:
    return batches.done_count(result) >= items


async def tokens_of(process: Process, chunks: ChunkStack) -> int:
    scraped = await scrape(chunks.stack, process.name)
    return int(scraped.total("llm_engine_tokens_total", gen_ai_token_type="output"))


def reason_of(item: batch_pb2.BatchItem) -> str:
    return str(unpack(item.error)["ErrorInfo"].reason)


async def test_a_thousand_items_end_once_each(chunks: ChunkStack) -> None:
    lines = [line(number) for number in range(1000)]
    price = llm_pb2.ModelPrice(prompt_micros_per_million=1_000_000, output_micros_per_million=2_000_000)
    async with worker(chunks) as process:
        results = await chunks.run(await chunks.requests(lines, price=price))
        assert await tokens_of(process, chunks) == 20_000
    items = await chunks.items(*results)
    assert_whole(items, lines)
    assert sum(result.counts.succeeded for result in results) == 1000
    assert sum(result.usage.output_tokens for result in results) == 20_000
    metadata = items[3].result.metadata
    assert metadata.cost_micros == metadata.prompt_tokens + 40
    assert (metadata.attempts, metadata.engine, metadata.model) == (1, "simulated", "docstrings")
    assert sum(item.result.metadata.cost_micros for item in items.values()) == sum(
        result.usage.cost_micros for result in results
    )
    assert all(len(result.SerializeToString()) < 2048 for result in results)


async def test_results_are_named_soon_by_few_names(chunks: ChunkStack) -> None:
    """Items end all the time, so that there are many segments to merge."""
    lines = [line(number, max_tokens=20 + number) for number in range(80)]
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    async with worker(chunks, seats=4, speed=100):
        for some in (10, 30, 60):
            found = await chunks.until(handle, partial(has_done, some))
            now, items = datetime.now(UTC), await chunks.items(found)
            newest = max(item.end_time.ToDatetime(UTC) for item in items.values())
            assert now - newest < timedelta(seconds=5)
        result = await ended(handle)
    assert_whole(await chunks.items(result), lines)


async def test_a_killed_workers_items_go_on(chunks: ChunkStack) -> None:
    lines = [line(number, max_tokens=100) for number in range(64)]
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    async with worker(chunks, speed=50) as first:
        await chunks.until(handle, lambda result, _: batches.done_count(result) >= 16 and result.counts.running == 16)
        before = await tokens_of(first, chunks)
        await first.kill()
    async with worker(chunks, speed=50) as second:
        result = await ended(handle)
        again = before + await tokens_of(second, chunks) - 6400
    items = await chunks.items(result)
    assert_whole(items, lines)
    # Half a second of all seats, of the machine's time.
    assert again <= 400
    continued = [item for item in items.values() if item.result.metadata.attempts == 2]
    # That of the first attempt counts, up to what was lost.
    assert all(item.result.metadata.engine_time.ToTimedelta() > timedelta(seconds=1.7) for item in continued)
    assert len(continued) >= 8
    assert not any(item.result.metadata.rewinds for item in items.values())
    # An item that had ended was perhaps not durable yet.
    ends = {item.result.attempts[0].end for item in continued}
    assert llm_pb2.ATTEMPT_END_WORKER_LOST in ends
    assert ends <= {llm_pb2.ATTEMPT_END_WORKER_LOST, llm_pb2.ATTEMPT_END_FINISHED}
    assert result.attempts >= 2


async def test_a_crash_neither_loses_a_grant_nor_doubles_it(chunks: ChunkStack) -> None:
    lines = [line(number, max_tokens=100) for number in range(64)]
    (request,) = await chunks.requests(lines, grant={"output_tokens": 2450})
    handle = await chunks.start(request)
    async with worker(chunks, seats=8, speed=50) as first:
        await chunks.until(handle, lambda result, _: batches.done_count(result) >= 8 and result.counts.running == 8)
        await first.kill()
    async with worker(chunks, seats=8, speed=200):
        result = await ended(handle)
        assert (result.usage.output_tokens, result.counts.succeeded) == (2400, 24)
        assert result.needed == common_pb2.Budget(output_tokens=2500)
        # The next one goes on, and its last item has what is left.
        request.earlier.CopyFrom(result)
        request.grant.output_tokens, request.last_grant = 2950, True
        (result,) = await chunks.run([request])
    assert (result.usage.output_tokens, result.counts.succeeded, result.counts.failed) == (2950, 29, 1)
    assert result.needed.output_tokens == 2951
    items = await chunks.items(result)
    assert sum(item.result.metadata.output_tokens for item in items.values()) == 2950


@pytest.mark.parametrize("last", [False, True])
async def test_the_time_in_engines_is_that_of_all_items(chunks: ChunkStack, last: bool) -> None:
    lines = [line(number, max_tokens=1000) for number in range(8)]
    (request,) = await chunks.requests(lines, grant={"engine_time": timedelta(seconds=8)}, last_grant=last)
    async with worker(chunks, seats=4, speed=50):
        (result,) = await chunks.run([request])
        assert result.HasField("needed")
        assert result.counts.failed == (4 if last else 0)
        if last:
            items = await chunks.items(result)
            assert {reason_of(item) for item in items.values()} == {"BUDGET_SPENT"}
            assert all(item.result.output for item in items.values())
            return
    # With more time the next activity goes on at the token.
    async with worker(chunks, seats=8, speed=5000):
        request.earlier.CopyFrom(result)
        request.ClearField("grant")
        (result,) = await chunks.run([request])
    items = await chunks.items(result)
    assert_whole(items, lines)
    assert sum(len(item.result.attempts) == 2 for item in items.values()) == 4
    assert not any(item.result.metadata.wasted_tokens for item in items.values())


async def test_a_stopping_worker_hands_its_chunk_over(chunks: ChunkStack) -> None:
    # The first ones show that it works, the others run when it is asked to stop.
    lines = [line(number, max_tokens=50 if number < 16 else 500) for number in range(48)]
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    async with worker(chunks, speed=50) as first:
        await chunks.until(handle, lambda result, _: batches.done_count(result) >= 16 and result.counts.running == 16)
        before = await tokens_of(first, chunks)
        await first.terminate()
    async with worker(chunks) as second:
        result = await ended(handle)
        # The first one has generated more after it was scraped.
        assert before + await tokens_of(second, chunks) <= 16 * 50 + 32 * 500
    items = await chunks.items(result)
    assert_whole(items, lines)
    assert not any(item.result.metadata.wasted_tokens for item in items.values())
    ends = {attempt.end for item in items.values() for attempt in item.result.attempts}
    assert ends == {llm_pb2.ATTEMPT_END_FINISHED, llm_pb2.ATTEMPT_END_HANDED_OVER}


async def test_a_zombie_changes_nothing(chunks: ChunkStack) -> None:
    lines = [line(number, max_tokens=200) for number in range(48)]
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    async with worker(chunks, speed=50) as zombie:
        await chunks.until(handle, lambda result, _: result.counts.running == 16)
        zombie.signal(signal.SIGSTOP)
        async with worker(chunks, speed=50):
            await chunks.until(handle, lambda _, attempt: attempt >= 2)
            await chunks.until(handle, lambda result, attempt: attempt >= 2 and result.counts.running == 16)
            zombie.signal(signal.SIGCONT)
            result = await ended(handle)
    assert_whole(await chunks.items(result), lines)


async def test_a_cancel_keeps_what_was_generated(chunks: ChunkStack) -> None:
    lines = four_short_lines()
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    async with worker(chunks, seats=8, speed=50) as process:
        await chunks.until(handle, lambda result, _: batches.done_count(result) >= 4 and result.counts.running == 8)
        before = await tokens_of(process, chunks)

        async def have_generated() -> bool:
            return await tokens_of(process, chunks) >= before + 8 * 20

        await until(have_generated)
        await handle.cancel()
        result = await ended(handle)
    await assert_stopped(chunks, result, lines, llm_pb2.JOB_STATE_CANCELLED, "CANCELLED")
    assert (result.counts.succeeded, result.counts.cancelled) == (4, 8)


async def test_the_end_of_the_window_keeps_what_was_generated(chunks: ChunkStack) -> None:
    """Of no more items than the batch allows at a time, although the worker has more seats."""
    lines = four_short_lines()
    async with worker(chunks, seats=16, speed=50):
        (request,) = await chunks.requests(lines, max_concurrent=8)
        request.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=5))
        (result,) = await chunks.run([request])
    await assert_stopped(chunks, result, lines, llm_pb2.JOB_STATE_TIMED_OUT, "WINDOW_OVER")
    assert (result.counts.succeeded, result.counts.expired) == (4, 8)


def four_short_lines() -> list[dict[str, Any]]:
    """Return many lines, of which the four that are planned first end soon."""
    return [{**line(number, max_tokens=8000), "priority": 4} for number in range(36)] + [
        {**line(number), "priority": 1} for number in range(36, 40)
    ]


async def assert_stopped(
    chunks: ChunkStack,
    result: internal_pb2.ChunkResult,
    lines: list[dict[str, Any]],
    state: "llm_pb2.JobState.ValueType",
    reason: str,
) -> None:
    items = await chunks.items(result)
    stopped = [item for item in items.values() if item.state != SUCCEEDED]
    assert len(stopped) == 8
    for item in stopped:
        assert (item.state, reason_of(item)) == (state, reason)
        assert item.result.metadata.output_tokens > 0
        # A character may be incomplete at the end.
        assert item.result.output
        assert expected(lines[item.index]).startswith(item.result.output)


async def test_an_item_that_fails_does_not_fail_the_others(chunks: ChunkStack) -> None:
    lines = [line(number) for number in range(20)]
    lines[3]["prompt"] = "[[fault:failed@3]]"
    lines[4]["prompt"] = "[[fault:failed@3:once]]"
    lines[5]["prompt"] = "long " * 2000
    lines[6]["params"]["regex"] = "a+"
    async with worker(chunks):
        (result,) = await chunks.run(await chunks.requests(lines))
    items = await chunks.items(result)
    failed = {index: reason_of(item) for index, item in items.items() if item.state != SUCCEEDED}
    assert failed == {3: "ENGINE_FAILED", 5: "PROMPT_TOO_LONG", 6: "UNSUPPORTED_PARAMS"}
    assert (result.counts.succeeded, result.counts.failed) == (17, 3)
    assert items[3].result.metadata.output_tokens == 3
    assert len(items[3].result.attempts) == 3
    assert (items[4].result.metadata.attempts, items[4].result.output) == (2, expected(lines[4]))


async def test_the_death_of_an_engine_costs_nothing_that_was_made(chunks: ChunkStack) -> None:
    lines = [line(number, max_tokens=100) for number in range(32)]
    lines[20]["prompt"] = "[[fault:die@50:once]]"
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    async with worker(chunks, speed=50) as first:
        assert await first.wait() == 1
    async with worker(chunks, speed=50):
        result = await ended(handle)
    items = await chunks.items(result)
    assert_whole(items, lines)
    assert not any(item.result.metadata.rewinds for item in items.values())
    assert items[20].result.attempts[0].error.code == 14


@pytest.mark.parametrize("fault", ["kill", "die"])
async def test_a_line_that_kills_its_worker_each_time_fails_alone(chunks: ChunkStack, fault: str) -> None:
    lines = [line(number, max_tokens=60) for number in range(12)]
    lines[4]["prompt"] = f"[[fault:{fault}@1]]"
    (request,) = await chunks.requests(lines)
    result = asyncio.create_task(ended(await chunks.start(request)))
    workers = 0
    while not result.done():
        async with worker(chunks, seats=8, speed=100, ready=False) as process:
            workers += 1
            assert workers < 8, "its workers die for ever"
            gone = asyncio.create_task(process.wait())
            await asyncio.wait({gone, result}, return_when=asyncio.FIRST_COMPLETED)
    items = await chunks.items(await result)
    assert {index: reason_of(item) for index, item in items.items() if item.state != SUCCEEDED} == {4: "WORKER_LOST"}


async def test_a_store_that_is_away_delays_and_loses_nothing(chunks: ChunkStack) -> None:
    lines = [line(number, max_tokens=50) for number in range(64)]
    folder, away = chunks.stack.state_dir / "store", chunks.stack.state_dir / "away"
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    async with worker(chunks, seats=8, speed=50) as process:
        found = await chunks.until(handle, lambda result, _: batches.done_count(result) >= 8)
        folder.rename(away)
        await until(lambda: "the store is away" in process.log)
        away.rename(folder)
        await chunks.until(handle, lambda result, _: batches.done_count(result) > batches.done_count(found))
        result = await ended(handle)
    assert_whole(await chunks.items(result), lines)
    assert result.attempts == 1


async def test_items_give_their_seats_to_interactive_jobs(chunks: ChunkStack) -> None:
    lines = [line(number, max_tokens=100) for number in range(6)]
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    async with worker(chunks, seats=2, speed=50, GPU_WORKER_PAUSE_WAIT="PT2M"):
        await chunks.until(handle, lambda result, _: result.counts.running == 2)
        job = await chunks.interactive(100)
        result = await job.result()
        assert result.metadata.queue_time.ToTimedelta() < timedelta(seconds=30)
        chunk = await ended(handle)
    items = await chunks.items(chunk)
    assert_whole(items, lines)
    assert sum(item.result.metadata.pauses for item in items.values()) >= 1
    assert not any(item.result.metadata.rewinds for item in items.values())


async def test_a_batch_of_an_urgent_class_makes_way_for_a_job(chunks: ChunkStack) -> None:
    """A worker that is full of items takes interactive jobs all the same."""
    lines = [line(number, max_tokens=100_000) for number in range(6)]
    batch = batch_pb2.BatchRequest(user_id="u", request_id="r", job_class=common_pb2.JOB_CLASS_HIGH)
    (request,) = await chunks.requests(lines, batch=batch)
    handle = await chunks.start(request)
    async with worker(chunks, seats=2, speed=50, GPU_WORKER_PAUSE_WAIT="PT2M"):
        await chunks.until(handle, lambda result, _: result.counts.running == 2)
        job = await chunks.interactive(10)
        async with asyncio.timeout(PATIENCE):
            await job.result()
        assert (await handle.describe()).status == WorkflowExecutionStatus.RUNNING
        await handle.cancel()
        await ended(handle)


async def test_a_feed_that_is_away_delays_nothing(chunks: ChunkStack) -> None:
    """Only the next attempt would need it."""
    lines = [line(number, max_tokens=100) for number in range(32)]
    (request,) = await chunks.requests(lines)
    handle = await chunks.start(request)
    nats = chunks.stack.processes["nats"]
    async with worker(chunks, speed=50):
        await chunks.until(handle, lambda result, _: result.counts.running == 16)
        await nats.kill()
        result = await ended(handle)
        await nats.start()
        await nats.wait_ready()
    assert_whole(await chunks.items(result), lines)


async def test_an_item_waits_as_long_as_its_provider_asks_for(chunks: ChunkStack) -> None:
    """The others go on meanwhile, and the worker does not take the item for one that hangs."""
    asked: list[tuple[str, float]] = []
    complete = streaming(piece("Said.", "stop"))

    async def answer(request: web.Request) -> web.Response:
        prompt = (await request.json())["messages"][-1]["content"]
        is_first = prompt not in {earlier for earlier, _ in asked}
        asked.append((prompt, time.monotonic()))
        if prompt == "Say 0." and is_first:
            return web.json_response({}, status=429, headers={"Retry-After": "4"})
        response: web.Response = await complete(request)
        return response

    (request,) = await chunks.requests([line(number) for number in range(6)])
    async with provider(answer) as address:
        engine = {
            "GPU_WORKER_ENGINE": "openai",
            "GPU_WORKER_ENGINE_OPTIONS": json.dumps({"base_url": f"http://{address}/v1", "context_tokens": 8192}),
            "GPU_WORKER_PREFILL_TIMEOUT": "PT1S",
        }
        async with worker(chunks, seats=2, **engine):
            (result,) = await chunks.run([request])
    items = await chunks.items(result)
    assert [(items[number].state, items[number].result.output) for number in range(6)] == 6 * [(SUCCEEDED, "Said.")]
    assert [len(items[number].result.attempts) for number in range(6)] == [2, 1, 1, 1, 1, 1]
    first, second = (at for prompt, at in asked if prompt == "Say 0.")
    assert 4 <= second - first < 8
    assert asked[-1] == ("Say 0.", second)
