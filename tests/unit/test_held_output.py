"""Output that an attempt holds back: never a first token, never longer than a moment, never past the attempt's end."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from temporalio.exceptions import ApplicationError

from feed.memory import MemoryFeed
from jobs.errors import ResultTooLarge
from jobs.stages import DONE
from llm_pb import internal_pb2, llm_pb2
from services.gpu_worker.attempt import Attempt
from services.gpu_worker.engines.engine import EngineConfig, Output, create_engine
from services.gpu_worker.report_throttle import ReportThrottle
from services.gpu_worker.settings import GpuWorkerSettings
from tests.support.jobs import new_job
from tests.unit.test_activity import KEY, SETTINGS, Worker

FOREVER = 3600.0
UNTHROTTLED = 17
"""Number of concurrent jobs from which on they publish less often."""


class SlowFeed(MemoryFeed):
    """Stores a repeated output only once it may, as a feed that waits for a tenant's key."""

    def __init__(self) -> None:
        super().__init__()
        self.repeating = asyncio.Event()
        self.may_store = asyncio.Event()

    async def sync(self, key: str, record: internal_pb2.FeedRecord) -> bool:
        if record.HasField("tokens_made"):
            self.repeating.set()
            await self.may_store.wait()
        return await super().sync(key, record)


class Log:
    """The texts of the records of a feed, as a reader gets them."""

    def __init__(self, feed: MemoryFeed, key: str = KEY) -> None:
        self.events: list[str] = []
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(feed.read(key, self._on_record))

    def _on_record(self, record: internal_pb2.FeedRecord) -> None:
        self.events.append(record.WhichOneof("event") or "")
        if record.HasField("tokens_made"):
            self.texts.append(record.tokens_made.text)
            self.tokens += record.tokens_made.token_ids
        self._changed.set()

    async def until(self, text: str) -> None:
        """Wait until the records have this text together."""
        async with asyncio.timeout(30):
            while "".join(self.texts) != text:
                self._changed.clear()
                await self._changed.wait()

    async def began(self) -> None:
        """Wait until there is output."""
        async with asyncio.timeout(30):
            while not self.texts:
                self._changed.clear()
                await self._changed.wait()

    async def ended(self) -> None:
        """Wait until the attempt has ended."""
        async with asyncio.timeout(30):
            while self.events[-1:] != ["attempt_ended"]:
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


async def of_an_attempt(feed: MemoryFeed, output_interval: float) -> Attempt:
    job = new_job(params={"max_tokens": 100})
    throttle = ReportThrottle(output_interval=output_interval)
    attempt = Attempt(internal_pb2.RunRequest(job=job), 1, datetime.now(UTC), KEY, "w", feed, SETTINGS, throttle)
    await attempt.start(first=True)
    await attempt.add(Output("", (), 1))
    return attempt


async def test_a_first_token_is_published_at_once_and_the_last_one_with_all_before_it() -> None:
    feed = MemoryFeed()
    attempt, log = await of_an_attempt(feed, FOREVER), Log(feed)
    for number, text in enumerate("abcd"):
        await attempt.add(Output(text, (number,), 1))
    await log.until("a")
    assert log.texts == ["a"]
    assert attempt.heartbeat().progress.output_bytes == 1
    await attempt.add(Output("e", (4,), 1, llm_pb2.FINISH_REASON_STOP))
    await log.until("abcde")
    assert log.texts == ["a", "bcde"]
    assert log.tokens == [*range(5)]
    await log.close()


async def test_what_is_held_back_is_published_though_no_more_comes() -> None:
    feed = MemoryFeed()
    attempt, log = await of_an_attempt(feed, 0.01), Log(feed)
    for number, text in enumerate("abc"):
        await attempt.add(Output(text, (number,), 1))
    await log.until("abc")
    await log.close()


async def test_tokens_of_a_provider_that_goes_on_are_not_held_back() -> None:
    """Temporal learns how much of its response was published."""
    feed = MemoryFeed()
    attempt, log = await of_an_attempt(feed, FOREVER), Log(feed)
    attempt.provider_response.response_id = "resp_1"
    for number, text in enumerate("abc"):
        await attempt.add(Output(text, (number,), 1))
    await log.until("abc")
    assert log.texts == ["a", "b", "c"]
    await log.close()


async def test_a_long_text_is_not_held_back() -> None:
    feed = MemoryFeed()
    attempt, log = await of_an_attempt(feed, FOREVER), Log(feed)
    await attempt.add(Output("a", (0,), 1))
    for number in range(1, 4):
        await attempt.add(Output("x" * 40_000, (number,), 1))
    await log.until("a" + "x" * 80_000)
    assert log.texts == ["a", "x" * 80_000]
    await log.close()


async def test_a_progress_report_that_repeats_a_lost_output_is_not_overtaken_by_what_was_held_back() -> None:
    """A reader of a feed that was lost would have a gap otherwise, until the job ends."""
    feed = SlowFeed()
    attempt = await of_an_attempt(feed, FOREVER)
    for number, text in enumerate("ab"):
        await attempt.add(Output(text, (number,), 1))
    await feed.remove(KEY)
    feed.recoveries = 1
    entering = asyncio.create_task(attempt.enter(DONE))
    await feed.repeating.wait()
    publishing = asyncio.create_task(attempt.publish())
    for _ in range(10):
        await asyncio.sleep(0)
    feed.may_store.set()
    await asyncio.gather(entering, publishing)
    log = Log(feed)
    await log.until("ab")
    await log.close()


async def test_an_answer_of_the_cache_that_is_too_large_is_published_as_far_as_it_fits() -> None:
    feed = MemoryFeed()
    attempt, log = await of_an_attempt(feed, FOREVER), Log(feed)
    attempt.max_output_bytes = 3
    pieces = [internal_pb2.CachedPiece(text=text, token_ids=[number]) for number, text in enumerate("abcd")]
    with pytest.raises(ResultTooLarge):
        await attempt.replay(internal_pb2.CachedAnswer(pieces=pieces))
    assert attempt.output.text == b"abc"
    await log.until("abc")
    await log.close()


@pytest.mark.parametrize("fault", ["", "[[fault:oom@150]]"])
async def test_many_jobs_publish_no_more_than_so_many_records_together(fault: str) -> None:
    """Each has the same output as alone, published before its attempt ends, by a failure too.

    Further jobs run from the first to the last: of the last 16 each would publish all its tokens at once.
    """
    engine = create_engine("simulated", EngineConfig("", 24 + UNTHROTTLED, {"tokens_per_second": 1000}))
    await engine.start()
    feed, settings = (
        MemoryFeed(),
        GpuWorkerSettings(engine="simulated", max_concurrent=24 + UNTHROTTLED, output_records_per_second=1),
    )
    job = new_job(f"Say it. {fault}", params={"max_tokens": 200})
    try:
        (alone,) = await run_together(Worker(engine, MemoryFeed()), job, 1)
        worker = Worker(engine, feed, settings=settings)
        async with running(worker, feed, UNTHROTTLED):
            began = time.monotonic()
            results = await run_together(worker, job, 24)
            seconds = time.monotonic() - began
    finally:
        await engine.close()
    assert {result.output for result in results} == {alone.output}
    for number in range(24):
        log = Log(feed, f"{number}")
        await log.ended()
        assert "".join(log.texts) == alone.output
        assert len(log.tokens) == alone.metadata.output_tokens
        # The first token, the end, and what is held back for as many seconds as there are jobs.
        assert len(log.texts) <= 2 + seconds / UNTHROTTLED
        await log.close()


@asynccontextmanager
async def running(worker: Worker, feed: MemoryFeed, count: int) -> AsyncIterator[None]:
    """Run long jobs while the context is open."""
    job = new_job("Go on.", params={"max_tokens": 8000})
    tasks = [asyncio.create_task(worker.run(job, feed_key=f"long-{number}")) for number in range(count)]
    logs = [Log(feed, f"long-{number}") for number in range(count)]
    try:
        for log in logs:
            await log.began()
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for log in logs:
            await log.close()


async def run_together(worker: Worker, job: llm_pb2.JobRequest, count: int) -> list[llm_pb2.JobResult]:
    """Run a job a number of times concurrently; return the results, partial ones too."""

    async def run(number: int) -> llm_pb2.JobResult:
        try:
            return await worker.run(job, feed_key=f"{number}")
        except ApplicationError as error:
            (detail,) = error.details
            assert isinstance(detail, llm_pb2.JobResult)
            return detail

    return await asyncio.gather(*map(run, range(count)))
