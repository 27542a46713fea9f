"""How attempts at jobs use the cache of answers."""

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.exceptions import ApplicationError

from feed.answers import Answers, CacheUnavailable, Entry
from feed.memory import MemoryAnswers, MemoryFeed
from jobs.costs import add_cost, used_tokens
from jobs.ids import workflow_id
from jobs.rules import check_job
from jobs.usage import usage_of
from llm_pb import internal_pb2, llm_pb2
from services.gpu_worker.answer_cache import job_digest
from services.gpu_worker.answer_pieces import rest_of
from services.gpu_worker.engines.engine import Engine, EngineConfig, create_engine
from services.gpu_worker.recipe import Recipe
from services.gpu_worker.settings import GpuWorkerSettings
from tests.support.jobs import new_job
from tests.unit.test_activity import SETTINGS, Noting, Worker, log_of, refill

ONE, OTHER = workflow_id("u", "1"), workflow_id("u", "2")


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[Engine]:
    engine = create_engine("simulated", EngineConfig("", 8, {"tokens_per_second": 2000}))
    await engine.start()
    yield engine
    await engine.close()


def cached_job(prompt: str = "Say ünïcödé.", ttl: float = 60, **changes: Any) -> llm_pb2.JobRequest:
    params = {"max_tokens": 40, "temperature": 0, **changes.pop("params", {})}
    job = new_job(prompt, params=params, **changes)
    job.cache.ttl.FromTimedelta(timedelta(seconds=ttl))
    return job


class Workers:
    """Workers that share a cache, and what their engine is asked for."""

    def __init__(self, engine: Engine, clock: Any = None) -> None:
        self.noting = Noting(engine)
        self.answers = Answers(MemoryAnswers(clock) if clock else MemoryAnswers(), None)

    def new(self, feed: MemoryFeed | None = None, settings: GpuWorkerSettings = SETTINGS, folder: str = "") -> Worker:
        engine = cast("Engine", self.noting)
        return Worker(engine, feed or MemoryFeed(), settings=settings, answers=self.answers, folder=folder)

    async def run(self, job: llm_pb2.JobRequest, id_: str = OTHER, **more: Any) -> llm_pb2.JobResult:
        return await self.new().run(job, workflow_id=id_, cache=True, **more)

    @property
    def generated(self) -> int:
        return len(self.noting.asked)

    async def until_generated(self) -> None:
        while not self.generated:  # noqa: ASYNC110  # the engine tells nobody
            await asyncio.sleep(0.01)


@pytest.fixture
def workers(engine: Engine) -> Workers:
    return Workers(engine)


async def test_an_equal_job_takes_the_answer(workers: Workers) -> None:
    first = await workers.run(cached_job(), ONE)
    feed = MemoryFeed()
    worker = workers.new(feed)
    second = await worker.run(cached_job(), workflow_id=OTHER, cache=True)
    assert workers.generated == 1
    assert (second.output, second.finish_reason) == (first.output, first.finish_reason)
    assert (first.metadata.cached, second.metadata.cached) == (False, True)
    for name in ("prompt_tokens", "output_tokens"):
        assert getattr(second.metadata, name) == getattr(first.metadata, name) > 0
    assert not second.metadata.HasField("gpu")
    assert not second.metadata.HasField("engine_time")
    records = await log_of(feed)
    text = "".join(record.tokens_made.text for record in records)
    assert text == first.output
    assert [stage for r in records if (stage := r.progress.stage)][-1] == "done"
    assert worker.counted("llm.job.cache", result="hit") == 1


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_broken_off_answer_goes_on_at_any_piece(workers: Workers, logprobs: int | None) -> None:
    """A worker dies while it publishes an answer of the cache: no byte comes twice."""
    params: dict[str, Any] = {"max_tokens": 900} | ({} if logprobs is None else {"logprobs": logprobs})
    first = await workers.run(cached_job(params=params), ONE)
    feed = MemoryFeed()
    whole = await workers.new(feed).run(cached_job(params=params), workflow_id=OTHER, cache=True)
    assert list(whole.logprobs) == list(first.logprobs)
    records = await log_of(feed)
    places = [place for place, record in enumerate(records, 1) if record.HasField("tokens_made")]
    assert len(places) > 2
    for place in places[:-1]:
        resumed = await workers.new(await refill(records[:place])).run(
            cached_job(params=params), 2, workflow_id=OTHER, cache=True
        )
        assert (resumed.output, resumed.metadata.rewinds) == (first.output, 0)
        assert list(resumed.logprobs) == list(first.logprobs)
    assert workers.generated == 1


@pytest.mark.parametrize(
    ("changes", "id_"),
    [
        ({"params": {"seed": 1}}, OTHER),
        ({"params": {"max_tokens": 41}}, OTHER),
        ({"params": {"stop": ["x"]}}, OTHER),
        ({"prompt": "Say ünïcödé!"}, OTHER),
        ({"messages": [{"role": llm_pb2.ROLE_USER, "content": "Say ünïcödé."}]}, OTHER),
        ({}, workflow_id("u", "1", "acme")),
    ],
    ids=["seed", "max_tokens", "stop", "prompt", "messages", "tenant"],
)
async def test_what_differs_is_generated(workers: Workers, changes: dict[str, Any], id_: str) -> None:
    await workers.run(cached_job(), ONE)
    assert not (await workers.run(cached_job(**changes), id_)).metadata.cached
    assert workers.generated == 2


async def test_what_changes_no_answer_may_differ(workers: Workers) -> None:
    await workers.run(cached_job(), ONE)
    same = cached_job(ttl=5, user_id="else", project_id="p", priority=4, labels={"a": "b"}, budget={"output_tokens": 1})
    assert (await workers.run(same)).metadata.cached
    default = cached_job()
    default.params.ClearField("max_tokens")
    assert (await workers.run(default, default_max_tokens=40)).metadata.cached


async def test_a_job_that_does_not_ask_is_generated(workers: Workers) -> None:
    await workers.run(cached_job(), ONE)
    plain = cached_job()
    plain.ClearField("cache")
    assert not (await workers.run(plain)).metadata.cached
    assert not (await workers.new().run(cached_job(), workflow_id=OTHER)).metadata.cached, "started by hand"


async def test_other_weights_and_options_find_nothing(workers: Workers, tmp_path: Path) -> None:
    job = cached_job()

    async def finds(**changes: Any) -> bool:
        settings = SETTINGS.model_copy(update=changes)
        result = await workers.new(settings=settings, folder=str(tmp_path)).run(job, workflow_id=OTHER, cache=True)
        return result.metadata.cached

    (tmp_path / "sub").mkdir()
    weights = tmp_path / "sub" / "weights.bin"
    weights.write_bytes(b"0" * 100)
    assert [await finds(), await finds()] == [False, True]
    weights.write_bytes(b"0" * 99 + b"1")
    assert [await finds(), await finds()] == [False, True]
    assert [await finds(engine_options={"dtype": "half"}), await finds(model_revision="2")] == [False, False]
    weights.write_bytes(b"anything")
    assert await finds(model_revision="2"), "a revision stands for the files"


async def test_weights_that_cannot_be_read_are_no_weights(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(tmp_path / "weights")
    (tmp_path / "folder").mkdir()
    assert await Recipe(SETTINGS, str(tmp_path)).digest() is not None
    await workers.run(cached_job(), ONE)


async def test_an_engine_without_a_folder_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated one, for example. Those of the current folder are not the model's."""
    monkeypatch.chdir(tmp_path)
    found = set()
    for data in (b"0", b"1"):
        (tmp_path / "log").write_bytes(data)
        found.add(await Recipe(SETTINGS, "").digest())
    assert len(found) == 1


async def test_the_name_of_a_file_may_be_any_bytes(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"weights-\xff")).write_bytes(b"0")
    assert await Recipe(SETTINGS, str(tmp_path)).digest() is not None


async def test_a_trained_model_has_no_revision_but_its_files(tmp_path: Path) -> None:
    """Its alias names other weights one day."""
    trained = GpuWorkerSettings(engine="torch", model="weather@latest", model_tenant="acme", model_revision="1")
    assert trained.is_trained
    found = set()
    for data in (b"0", b"1"):
        (tmp_path / "weights").write_bytes(data)
        found.add(await Recipe(trained, str(tmp_path)).digest())
    assert len(found) == 2


@pytest.mark.heavy
def test_a_worker_that_stops_does_not_wait_for_its_weights(tmp_path: Path) -> None:
    """To read so many would take many minutes."""
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(1 << 40)
    begun = time.monotonic()
    assert asyncio.run(Recipe(SETTINGS, str(tmp_path)).digest()) is None
    assert time.monotonic() - begun < 100


async def test_an_answer_is_taken_while_it_is_young_enough(engine: Engine) -> None:
    now = 0.0
    workers = Workers(engine, lambda: now)
    await workers.run(cached_job(ttl=60), ONE)
    now = 59
    assert (await workers.run(cached_job(ttl=60))).metadata.cached
    now = 61
    assert not (await workers.run(cached_job(ttl=60))).metadata.cached
    key = await workers.answers.key(job_digest(cached_job(), await Recipe(SETTINGS, "").digest() or b""))
    answer, _ = await workers.answers.find(key)
    assert answer is not None
    answer.made_at.seconds -= 30
    await workers.answers.put(key, ONE, answer, timedelta(hours=1))
    assert (await workers.run(cached_job(ttl=60))).metadata.cached
    assert not (await workers.run(cached_job(ttl=20))).metadata.cached, "it is older than this job takes"


async def test_of_equal_jobs_one_generates(workers: Workers) -> None:
    """The others wait without a seat: another attempt of the same worker gets it meanwhile."""
    settings = SETTINGS.model_copy(update={"max_concurrent": 1})
    async with asyncio.timeout(60):
        slow = cached_job(params={"max_tokens": 1000})
        begun = asyncio.create_task(workers.run(slow, ONE))
        await workers.until_generated()
        worker = workers.new(settings=settings)
        waiting = [
            asyncio.create_task(worker.run(slow, workflow_id=workflow_id("u", f"w{n}"), cache=True)) for n in "ab"
        ]
        other = await worker.run(new_job(params={"max_tokens": 3}), workflow_id=workflow_id("u", "z"))
        assert other.metadata.output_tokens == 3
        results = [await begun, *await asyncio.gather(*waiting)]
    assert len({result.output for result in results}) == 1
    assert sorted(result.metadata.cached for result in results) == [False, True, True]
    assert workers.generated == 2


async def test_a_job_that_fails_lets_the_next_one_generate(engine: Engine) -> None:
    """Nothing is kept of a job that did not succeed, and nobody waits for it. No claim ends by itself here."""
    workers = Workers(engine, lambda: 0.0)
    prompt = "[[fault:failed@500:once]] go"
    job = cached_job(prompt, params={"max_tokens": 600})
    async with asyncio.timeout(60):
        failing = asyncio.create_task(workers.run(job, ONE))
        await workers.until_generated()
        waiting = asyncio.create_task(workers.run(job))
        with pytest.raises(ApplicationError):
            await failing
        assert not (await waiting).metadata.cached
        assert (await workers.run(job)).metadata.cached


async def test_a_lost_worker_delays_the_next_job_by_a_bound(engine: Engine) -> None:
    now = 0.0
    workers = Workers(engine, lambda: now)
    key = await workers.answers.key(job_digest(cached_job(), await Recipe(SETTINGS, "").digest() or b""))
    assert await workers.answers.store.claim(key, 0)
    async with asyncio.timeout(60):
        waiting = asyncio.create_task(workers.run(cached_job()))
        await asyncio.sleep(0.4)
        assert not waiting.done()
        now = 7.0
        assert not (await waiting).metadata.cached


async def test_an_output_that_another_attempt_began_is_not_kept(workers: Workers) -> None:
    """The other worker may have had other weights."""
    feed = MemoryFeed()
    worker = workers.new(feed)
    whole = await worker.run(cached_job(params={"seed": 3}), workflow_id=ONE)
    records = await log_of(feed)
    half = [place for place, record in enumerate(records, 1) if record.HasField("tokens_made")][10]
    job = cached_job(params={"seed": 3})
    resumed = await workers.new(await refill(records[:half])).run(job, 2, workflow_id=ONE, cache=True)
    assert resumed.output == whole.output
    assert not (await workers.run(cached_job(params={"seed": 3}))).metadata.cached


async def test_an_attempt_that_starts_over_does_not_wait_for_itself(workers: Workers) -> None:
    """Its engine cannot continue what another worker has begun, and it holds the claim by then."""
    feed = MemoryFeed()
    await workers.new(feed).run(cached_job(params={"seed": 3}), workflow_id=ONE)
    records = await log_of(feed)
    half = [place for place, record in enumerate(records, 1) if record.HasField("tokens_made")][10]
    job = cached_job(params={"seed": 4})
    async with asyncio.timeout(10):
        resumed = await workers.new(await refill(records[:half])).run(job, 2, workflow_id=ONE, cache=True)
    assert (resumed.metadata.cached, resumed.metadata.rewinds) == (False, 1)
    again = await workers.run(job)
    assert again.output == resumed.output
    assert again.metadata.cached, "it has generated all of it"


async def test_a_cache_that_fails_is_no_cache(engine: Engine) -> None:
    """At any call: the job generates, and its output is whole."""

    class Failing(MemoryAnswers):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __getattribute__(self, name: str) -> Any:
            if name == object.__getattribute__(self, "__dict__").get("name"):

                async def fail(*_: Any) -> Any:
                    raise CacheUnavailable("away")

                return fail
            return super().__getattribute__(name)

    outputs = set()
    for name in ("find", "claim", "put", "release"):
        workers = Workers(engine)
        workers.answers = Answers(Failing(name), None)
        outputs.add((await workers.run(cached_job(), ONE)).output)
    assert len(outputs) == 1


async def test_a_stored_answer_that_is_damaged_is_generated_again(workers: Workers) -> None:
    class Damaged(MemoryAnswers):
        async def find(self, key: str) -> Entry:
            return (await super().find(key))._replace(data=b"\xff\xff\xff")

    workers.answers = Answers(Damaged(), None)
    assert not (await workers.run(cached_job(), ONE)).metadata.cached


def test_only_a_part_of_the_answer_is_continued() -> None:
    pieces = [internal_pb2.CachedPiece(text="aé", token_ids=[1, 2]), internal_pb2.CachedPiece(text="z", token_ids=[3])]
    answer = internal_pb2.CachedAnswer(pieces=pieces)
    held = dataclasses.make_dataclass("Held", ["token_ids", "text"])
    assert [p.text for p in rest_of(answer, held([], b"")) or ()] == ["aé", "z"]
    assert [p.text for p in rest_of(answer, held([1], b"a")) or ()] == ["é", "z"]
    assert [list(p.token_ids) for p in rest_of(answer, held([1, 2], b"a\xc3\xa9")) or ()] == [[3]]
    assert [p.text for p in rest_of(answer, held([1, 2, 3], b"a\xc3\xa9z")) or ()] == [""]
    for ids, text in (([2], b"a"), ([1], b"b"), ([1, 2, 3, 4], b"a\xc3\xa9z")):
        assert rest_of(answer, held(ids, text)) is None


def test_an_answer_of_the_cache_uses_nothing() -> None:
    result = llm_pb2.JobResult(metadata={"prompt_tokens": 5, "output_tokens": 7, "cached": True, "wasted_tokens": 2})
    price = llm_pb2.ModelPrice(currency="EUR", prompt_micros_per_million=10**6, output_micros_per_million=10**6)
    assert used_tokens(result) == 0
    add_cost(result.metadata, internal_pb2.JobOptions(price=price))
    assert result.metadata.HasField("cost_micros")
    usage = usage_of(result.metadata)
    assert (usage.prompt_tokens, usage.output_tokens, usage.cost_micros, usage.wasted_tokens) == (0, 0, 0, 2)


@pytest.mark.parametrize(
    ("params", "ttl", "wrong"),
    [
        ({"temperature": 0}, 1, []),
        ({"seed": 0}, 2_592_000, []),
        ({}, 1, ["cache"]),
        ({"temperature": 0.5, "top_k": 1}, 1, ["cache"]),
        ({"seed": 1}, 0, ["cache.ttl"]),
        ({"seed": 1}, 2_592_001, ["cache.ttl"]),
    ],
)
def test_only_what_can_be_had_again_is_cached(params: dict[str, Any], ttl: int, wrong: list[str]) -> None:
    job = new_job(params=params, cache=llm_pb2.AnswerCache(ttl=Duration(seconds=ttl)))
    assert [violation.field for violation in check_job(job)] == wrong
