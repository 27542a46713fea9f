"""RunLLMOnGPU on its own: how an attempt uses the feed that an earlier attempt wrote."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from feed.answers import Answers
from feed.memory import MemoryFeed
from jobs.application_errors import partial_result
from jobs.errors import RULES, EngineDead, EngineFailed, JobError
from jobs.ids import workflow_id
from jobs.rules import check_job
from llm_pb import common_pb2, internal_pb2, llm_pb2
from services.gateway.left_output import recovered_output
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.answer_cache import AnswerCache
from services.gpu_worker.attempt import Attempt
from services.gpu_worker.engines.engine import Engine, EngineConfig, Generation, Output, create_engine
from services.gpu_worker.recipe import Recipe
from services.gpu_worker.report_throttle import ReportThrottle
from services.gpu_worker.settings import GpuWorkerSettings
from store.objects import open_objects
from store.outputs import write_output
from store.settings import StoreSettings
from store.store import Store
from tests.support.jobs import new_job

KEY = ActivityEnvironment.default_info().workflow_run_id or ""
SETTINGS = GpuWorkerSettings(engine="simulated")


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[Engine]:
    engine = create_engine("simulated", EngineConfig("", 8, {"tokens_per_second": 2000}))
    await engine.start()
    yield engine
    await engine.close()


class Worker:
    """The activity with its dependencies, and the metrics that it has recorded."""

    def __init__(
        self,
        engine: Engine,
        feed: MemoryFeed,
        name: str = "w",
        settings: GpuWorkerSettings = SETTINGS,
        store: Store | None = None,
        answers: Answers | None = None,
        folder: str = "",
    ) -> None:
        self._reader = InMemoryMetricReader()
        meter = MeterProvider([self._reader]).get_meter("test")
        loaded = asyncio.create_task(asyncio.sleep(0))
        cache = AnswerCache(answers, Recipe(settings, folder), meter)
        self._activity = RunLLMOnGPU(engine, loaded, feed, settings, name, meter, trace.NoOpTracer(), store, cache)
        self.seats = self._activity.seats

    async def run(
        self, job: llm_pb2.JobRequest, attempt: int = 1, handovers: int = 0, workflow_id: str = "test", **earlier: Any
    ) -> llm_pb2.JobResult:
        environment = ActivityEnvironment()
        # The environment's own timeout is a second, of which an attempt that has waited for a seat uses nine tenths.
        limits = {"start_to_close_timeout": timedelta(minutes=5)}
        environment.info = dataclasses.replace(environment.info, attempt=attempt, workflow_id=workflow_id, **limits)
        request = internal_pb2.RunRequest(job=job, handovers=handovers, **earlier)
        request.create_time.GetCurrentTime()
        return await environment.run(self._activity.__call__, request)

    def counted(self, name: str, **labels: str) -> int:
        data = self._reader.get_metrics_data()
        points = [
            point.value
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
            if labels.items()
            <= {name.rpartition(".")[2]: text for name, text in (point.attributes or {}).items()}.items()
        ]
        return sum(points)


async def log_of(feed: MemoryFeed) -> list[internal_pb2.FeedRecord]:
    """Remove the feed and return its records."""
    await feed.append(KEY, internal_pb2.FeedRecord(writer="end"))
    records: list[internal_pb2.FeedRecord] = []

    def take(record: internal_pb2.FeedRecord) -> bool:
        records.append(record)
        return record.writer == "end"

    await feed.read(KEY, take)
    await feed.remove(KEY)
    return records[:-1]


async def broken_off(engine: Engine, job: llm_pb2.JobRequest, after: int) -> list[internal_pb2.FeedRecord]:
    """Return the records that an attempt leaves in the feed when it is killed after `after` pieces of output."""
    feed = MemoryFeed()
    await Worker(engine, feed).run(job)
    kept, pieces = [], 0
    for record in await log_of(feed):
        pieces += record.WhichOneof("event") == "tokens_made"
        if pieces > after:
            break
        kept.append(record)
    return kept


async def refill(records: list[internal_pb2.FeedRecord]) -> MemoryFeed:
    feed = MemoryFeed()
    for record in records:
        await feed.append(KEY, record)
    return feed


class Noting:
    """An engine that notes what it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.asked: list[Generation] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        self.asked.append(generation)
        return self._engine.generate(generation)


JOB = new_job("Say something with ünïcödé.", params={"max_tokens": 60, "stop": ["no such text"]})


async def test_the_engine_learns_the_tenant_from_the_workflows_id(engine: Engine) -> None:
    """It must not share cached prompts between two tenants' users of the same name."""
    noting = Noting(engine)
    worker = Worker(cast("Engine", noting), MemoryFeed())
    job = new_job(params={"max_tokens": 2})
    for id_ in (workflow_id("u", "r", "acme-2"), workflow_id("u", "r"), "by hand"):
        await worker.run(job, workflow_id=id_)
    user = job.user_id
    assert [generation.owner for generation in noting.asked] == [f"acme-2/{user}", user, user]


@pytest.mark.parametrize("handed_over", [False, True])
async def test_an_attempt_continues(engine: Engine, *, handed_over: bool) -> None:
    """After a crash or a handover at any token the output is the same, and only the rest of it is generated."""
    whole = await Worker(engine, MemoryFeed()).run(JOB)
    for after in range(1, 60, 7):
        left = await broken_off(engine, JOB, after)
        feed = await refill(left)
        worker = Worker(engine, feed)
        result = await worker.run(JOB, attempt=1 if handed_over else 2, handovers=int(handed_over))
        assert result.output == whole.output
        assert result.metadata.output_tokens == 60
        assert result.metadata.first_token_time == next(
            record.tokens_made.made_at for record in left if record.tokens_made.HasField("made_at")
        )
        made = [r for r in (await log_of(feed))[len(left) :] if r.WhichOneof("event") == "tokens_made"]
        assert sum(len(record.tokens_made.token_ids) for record in made) == 60 - after
        assert (worker.counted("llm.job.continuations"), worker.counted("llm.job.rewinds")) == (1, 0)


async def starts_over(engine: Engine, job: llm_pb2.JobRequest, records: list[internal_pb2.FeedRecord]) -> None:
    """Check that a second attempt generates the whole output, and counts a rewind."""
    feed = await refill(records)
    worker = Worker(engine, feed)
    result = await worker.run(job, attempt=2)
    assert result.output == (await Worker(engine, MemoryFeed()).run(job)).output
    made = [r.tokens_made for r in (await log_of(feed))[len(records) :] if r.WhichOneof("event") == "tokens_made"]
    assert made[0].token_offset == made[0].offset == 0
    assert sum(len(record.token_ids) for record in made) == 60
    assert (worker.counted("llm.job.continuations"), worker.counted("llm.job.rewinds")) == (0, 1)
    assert made[-1].wasted_tokens == result.metadata.wasted_tokens


async def test_a_lost_log_means_starting_over(engine: Engine) -> None:
    await starts_over(engine, JOB, [])


async def test_output_that_the_feed_lost_at_a_handover_is_a_rewind(engine: Engine) -> None:
    """Watchers hold the lost output, and the output that replaces it may differ."""
    whole = (await Worker(engine, MemoryFeed()).run(JOB)).output
    queue_time = Duration(seconds=1)
    for lost, earlier, rewinds, lowest in ((False, 0, 0, 0), (True, 0, 1, None), (True, 2, 3, 5), (False, 2, 2, 5)):
        left = await broken_off(engine, JOB, 40)
        published = sum(len(record.tokens_made.text.encode()) for record in left)
        kept = left[:20] if lost else left
        offset = sum(len(record.tokens_made.text.encode()) for record in kept)
        known = {"rewinds": earlier, "lowest_rewind_offset": 5 if earlier else 0, "output_bytes": published}
        result = await Worker(engine, await refill(kept)).run(JOB, handovers=1, queue_time=queue_time, **known)
        assert result.output == whole
        found = (result.metadata.rewinds, result.metadata.lowest_rewind_offset)
        assert found == (rewinds, offset if lowest is None else lowest)


async def test_an_attempt_after_one_that_made_nothing_takes_nothing_back(engine: Engine) -> None:
    feed = await refill([internal_pb2.FeedRecord(writer="1", attempt_started=internal_pb2.AttemptStarted(attempt=1))])
    worker = Worker(engine, feed)
    assert (await worker.run(JOB, attempt=2)).metadata.output_tokens == 60
    assert (worker.counted("llm.job.continuations"), worker.counted("llm.job.rewinds")) == (0, 0)


async def test_tokens_of_attempts_that_started_over_are_wasted(engine: Engine) -> None:
    """Each counts once: whoever restarts, and whether the feed, a heartbeat or both tell of them."""
    job = new_job("[[vary]]", params={"max_tokens": 60})
    feed = await refill(await broken_off(engine, job, 20))
    # This attempt is killed before its first token, so that the 20 tokens are still the output.
    started = internal_pb2.FeedRecord(writer="2", attempt_started=internal_pb2.AttemptStarted(attempt=2))
    await feed.append(KEY, started)
    left = await recovered_output(await refill(await log_of(feed)), KEY, None, "")
    assert left is not None
    assert (left.metadata.output_tokens, left.metadata.wasted_tokens) == (20, 0)
    feed = await refill([*await broken_off(engine, job, 20), started])
    result = await Worker(engine, feed).run(job, attempt=3)
    assert (result.metadata.output_tokens, result.metadata.wasted_tokens) == (60, 20)
    # All of it starts over once more, after a hand-over that told of more tokens than the feed still holds.
    earlier = llm_pb2.ResultMetadata(output_tokens=60, wasted_tokens=20)
    queue_time = Duration(seconds=1)
    for lost in (0, 30, 60):
        records = await log_of(feed)
        made = [record for record in records if record.tokens_made.wasted_tokens]
        feed = await refill([record for record in records if record not in made[60 - lost :]])
        result = await Worker(engine, feed).run(job, handovers=1, queue_time=queue_time, metadata=earlier)
        assert (result.metadata.output_tokens, result.metadata.wasted_tokens) == (60, 80)
        feed = await refill(records)


async def test_tokens_that_the_feed_lost_before_an_attempt_continues_are_wasted(engine: Engine) -> None:
    left = await broken_off(engine, JOB, 20)
    known = {"queue_time": Duration(seconds=1), "metadata": llm_pb2.ResultMetadata(output_tokens=25)}
    result = await Worker(engine, await refill(left)).run(JOB, handovers=1, **known)
    assert (result.metadata.output_tokens, result.metadata.wasted_tokens) == (60, 5)


async def test_a_log_with_a_gap_means_starting_over(engine: Engine) -> None:
    left = await broken_off(engine, JOB, 20)
    del left[len(left) // 2]
    await starts_over(engine, JOB, left)


async def test_another_models_log_means_starting_over(engine: Engine) -> None:
    """The engine refuses to continue tokens that it would not have generated."""
    other = llm_pb2.JobRequest()
    other.CopyFrom(JOB)
    other.prompt = "Say something else."
    await starts_over(engine, JOB, await broken_off(engine, other, 20))


async def test_a_job_that_was_accepted_before_a_rule_goes_on(engine: Engine) -> None:
    """A worker does not apply a rule that the job's gateway did not have, for example during a rolling upgrade."""
    job = llm_pb2.JobRequest()
    job.CopyFrom(JOB)
    job.notify.add(webhook=llm_pb2.Webhook(url="https://10.1/hook"))
    assert check_job(job)
    result = await Worker(engine, await refill(await broken_off(engine, JOB, 20))).run(job, attempt=2)
    assert result.output == (await Worker(engine, MemoryFeed()).run(JOB)).output


async def test_an_attempt_that_cannot_begin_keeps_what_an_earlier_one_generated(engine: Engine) -> None:
    """A worker of another model that polls the wrong queue is an example."""
    job = llm_pb2.JobRequest()
    job.CopyFrom(JOB)
    job.model = "another"
    with pytest.raises(ApplicationError) as failed:
        await Worker(engine, await refill(await broken_off(engine, JOB, 20))).run(job, attempt=2)
    assert failed.value.type == "UNKNOWN_MODEL"
    (detail,) = failed.value.details
    assert detail.metadata.output_tokens == 20
    assert (await Worker(engine, MemoryFeed()).run(JOB)).output.startswith(detail.output)
    assert detail.output


async def test_a_job_with_logprobs_continues(engine: Engine) -> None:
    """The result has the log probabilities of all tokens, as that of an uninterrupted run."""
    job = llm_pb2.JobRequest()
    job.CopyFrom(JOB)
    job.params.logprobs = 3
    whole = await Worker(engine, MemoryFeed()).run(job)
    assert len(whole.logprobs) == 60
    for after in range(1, 60, 13):
        left = await broken_off(engine, job, after)
        feed = await refill(left)
        worker = Worker(engine, feed)
        result = await worker.run(job, attempt=2)
        assert (result.output, result.logprobs) == (whole.output, whole.logprobs)
        made = [r.tokens_made for r in (await log_of(feed))[len(left) :] if r.WhichOneof("event") == "tokens_made"]
        assert sum(len(record.token_ids) for record in made) == 60 - after
        assert (worker.counted("llm.job.continuations"), worker.counted("llm.job.rewinds")) == (1, 0)


async def test_a_log_of_an_earlier_version_without_logprobs_means_starting_over(engine: Engine) -> None:
    job = llm_pb2.JobRequest()
    job.CopyFrom(JOB)
    job.params.logprobs = 1
    left = await broken_off(engine, job, 20)
    for record in left:
        if record.HasField("tokens_made"):
            record.tokens_made.ClearField("logprobs")
    await starts_over(engine, job, left)


async def test_a_zombies_records_are_void(engine: Engine) -> None:
    """An attempt does not continue from records that an attempt wrote after another one took over."""
    left = await broken_off(engine, JOB, 20)
    zombie = internal_pb2.FeedRecord()
    zombie.CopyFrom(left[-1])
    takes_over = internal_pb2.FeedRecord(writer="second", attempt_started=internal_pb2.AttemptStarted(attempt=2))
    zombie.tokens_made.offset += len(zombie.tokens_made.text.encode())
    zombie.tokens_made.token_offset += len(zombie.tokens_made.token_ids)
    result = await Worker(engine, await refill([*left, takes_over, zombie])).run(JOB, attempt=3)
    assert result.output == (await Worker(engine, MemoryFeed()).run(JOB)).output


async def test_temporal_is_told_of_each_response_of_a_provider_at_once() -> None:
    """Of one that takes the place of a lost one, too: a worker that is killed before that pays twice."""
    request = internal_pb2.RunRequest(job=JOB)
    attempt = Attempt(request, 2, datetime.now(UTC), KEY, "w", MemoryFeed(), SETTINGS, ReportThrottle())
    await attempt.start(first=True)
    for id_, now in (("", False), ("resp_1", True), ("resp_1", False), ("", False), ("resp_2", True)):
        attempt.provider_response.response_id = id_
        await attempt.add(Output("", (), 1))
        assert attempt.beat_now.is_set() == now, id_
        attempt.beat_now.clear()


async def test_a_failure_carries_what_was_made(engine: Engine) -> None:
    """The workflow finds the partial result in the error's details."""
    with pytest.raises(ApplicationError) as failed:
        await Worker(engine, MemoryFeed()).run(new_job("[[fault:oom@7]]", params={"max_tokens": 20}))
    assert failed.value.type == "OUT_OF_MEMORY"
    assert not failed.value.non_retryable
    (detail,) = failed.value.details
    assert detail.metadata.output_tokens == 7


@pytest.mark.parametrize(("fault", "error"), [("failed@3", EngineFailed), ("die@3", EngineDead)])
async def test_a_failed_attempt_is_tried_again_by_the_table(fault: str, error: type[JobError]) -> None:
    own = create_engine("simulated", EngineConfig("", 8, {"tokens_per_second": 2000}))
    await own.start()
    with pytest.raises(ApplicationError) as failed:
        await Worker(own, MemoryFeed()).run(new_job(f"[[fault:{fault}]]", params={"max_tokens": 20}))
    assert failed.value.type == error.reason
    assert not failed.value.non_retryable
    assert failed.value.next_retry_delay == RULES[error].retry_delay
    await own.close()


async def test_an_attempt_without_a_seat_hands_the_job_over_as_earlier_workflow_code_knows_it(engine: Engine) -> None:
    """The error is that of a worker that stops. The end of the attempt tells the difference."""
    settings = GpuWorkerSettings(engine="simulated", max_concurrent=1, pause_wait=timedelta(milliseconds=10))
    feed = MemoryFeed()
    worker = Worker(engine, feed, settings=settings)
    background = new_job(params={"max_tokens": 2000}, job_class=common_pb2.JOB_CLASS_BACKGROUND)
    # It has the only seat until it is asked for it.
    paused = asyncio.create_task(worker.run(background, feed_key="background"))
    await worker.seats.until(lambda: bool(worker.seats.taken))
    urgent = await worker.run(new_job(params={"max_tokens": 200}), feed_key="urgent")
    assert urgent.metadata.output_tokens == 200
    with pytest.raises(ApplicationError) as failed:
        await paused
    assert (failed.value.type, failed.value.non_retryable) == ("WORKER_SHUTDOWN", True)
    (detail,) = failed.value.details
    assert detail.attempts[-1].end == llm_pb2.ATTEMPT_END_PAUSED
    assert (detail.attempts[-1].HasField("error"), detail.metadata.pauses) == (False, 1)
    # Another worker goes on at the same token.
    rest = await Worker(engine, feed, "other").run(background, handovers=1, feed_key="background")
    assert rest.output == (await Worker(engine, MemoryFeed()).run(background)).output


async def fails(
    worker: Worker, job: llm_pb2.JobRequest, attempt: int, reason: str = "OUT_OF_MEMORY"
) -> llm_pb2.JobResult:
    """Run an attempt that fails, and return the partial result that it reports to the workflow."""
    with pytest.raises(ApplicationError) as failed:
        await worker.run(job, attempt)
    assert failed.value.type == reason
    (detail,) = failed.value.details
    assert isinstance(detail, llm_pb2.JobResult)
    return detail


async def of_a_first_attempt(engine: Engine, feed: MemoryFeed) -> llm_pb2.JobResult:
    return await fails(Worker(engine, feed), new_job("[[fault:oom@7]]"), 1)


async def of_one_that_continues(engine: Engine, feed: MemoryFeed) -> llm_pb2.JobResult:
    job, earlier = new_job("[[fault:oom@30]]"), MemoryFeed()
    await fails(Worker(engine, earlier, "earlier"), job, 1)
    for record in (await log_of(earlier))[:20]:
        await feed.append(KEY, record)
    return await fails(Worker(engine, feed), job, 2)


async def of_one_that_starts_over(engine: Engine, feed: MemoryFeed) -> llm_pb2.JobResult:
    job = new_job("[[vary]] [[fault:oom@7]]")
    await fails(Worker(engine, feed, "earlier"), job, 1)
    return await fails(Worker(engine, feed), job, 2)


async def of_one_that_cannot_begin(engine: Engine, feed: MemoryFeed) -> llm_pb2.JobResult:
    job = new_job("[[fault:oom@7]]")
    await fails(Worker(engine, feed, "earlier"), job, 1)
    job.model = "another"
    return await fails(Worker(engine, feed), job, 2, "UNKNOWN_MODEL")


async def of_one_whose_result_gets_too_large(_: Engine, feed: MemoryFeed) -> llm_pb2.JobResult:
    engine = create_engine("simulated", EngineConfig("", 8, {"tokens_per_second": 1e6}))
    await engine.start()
    job = new_job(params={"max_tokens": 8000, "logprobs": 20})
    return await fails(Worker(engine, feed), job, 1, "RESULT_TOO_LARGE")


@pytest.mark.parametrize(
    "attempted",
    [
        of_a_first_attempt,
        of_one_that_continues,
        of_one_that_starts_over,
        of_one_that_cannot_begin,
        pytest.param(of_one_whose_result_gets_too_large, marks=pytest.mark.heavy),
    ],
)
async def test_the_feed_holds_the_partial_result_of_an_attempt(
    engine: Engine, attempted: Callable[[Engine, MemoryFeed], Awaitable[llm_pb2.JobResult]]
) -> None:
    """An attempt that cannot report loses only timings, engine, GPU and model, which the feed does not hold."""
    feed = MemoryFeed()
    reported = await attempted(engine, feed)
    left = await recovered_output(feed, KEY, None, "")
    assert left is not None
    assert left.metadata.output_tokens > 0
    for field in ("queue_time", "engine_time", "time_to_first_token", "latency", "engine", "gpu", "model"):
        reported.metadata.ClearField(field)
    assert left == reported


WIDE = llm_pb2.SamplingParams(max_tokens=700)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_objects(StoreSettings(url=(tmp_path / "store").as_uri()))


async def test_a_large_output_is_a_file_only_where_gateway_and_worker_can(engine: Engine, store: Store) -> None:
    """A gateway of an earlier version sets no maximum, and does not read files."""
    job = new_job("[[wide]]", params=WIDE)
    with pytest.raises(ApplicationError) as error:
        await Worker(engine, MemoryFeed(), store=store).run(job)
    assert error.value.type == "RESULT_TOO_LARGE"
    with pytest.raises(ApplicationError) as error:
        await Worker(engine, MemoryFeed()).run(job, max_output_bytes=50_000_000)
    assert error.value.type == "RESULT_TOO_LARGE"
    result = await Worker(engine, MemoryFeed(), store=store).run(job, max_output_bytes=50_000_000)
    assert not result.output
    assert result.output_file.size_bytes > 2_000_000


async def test_output_and_logprobs_have_a_maximum(engine: Engine, store: Store) -> None:
    worker = Worker(engine, MemoryFeed(), store=store)
    with pytest.raises(ApplicationError) as error:
        await worker.run(new_job("[[wide]]", params=WIDE), max_output_bytes=2_000_000)
    assert error.value.type == "RESULT_TOO_LARGE"
    partial = partial_result(error.value)
    assert partial is not None
    assert 1_900_000 < partial.output_file.size_bytes <= 2_000_000
    small = await worker.run(new_job(params={"max_tokens": 20}), max_output_bytes=2_000_000)
    assert small.output
    assert not small.HasField("output_file")


async def test_a_result_holds_less_where_the_job_says_so(engine: Engine, store: Store) -> None:
    """The step of a pipeline has a smaller maximum, also where its output is read back from the feed."""
    job, sizes = new_job("[[wide]]", params={"max_tokens": 20}), {"max_output_bytes": 2_000_000}
    assert (await Worker(engine, MemoryFeed(), store=store).run(job, **sizes)).output
    feed, sizes = MemoryFeed(), {**sizes, "max_inline_bytes": 65_536}
    result = await Worker(engine, feed, store=store).run(job, **sizes)
    assert not result.output
    assert result.output_file.size_bytes > 65_536
    left = await recovered_output(feed, KEY, store, "test", 65_536)
    assert left is not None
    assert left.output_file.sha256 == result.output_file.sha256


async def test_the_output_of_a_job_is_the_prompt_of_another_one(engine: Engine, store: Store) -> None:
    worker, text = Worker(engine, MemoryFeed(), store=store), "Grüße, 世界. " * 10
    ref = await write_output(store, "test", text.encode())
    job = new_job("", params={"max_tokens": 20}, prompt_file=ref)
    assert (await worker.run(job)).output == (await worker.run(new_job(text, params={"max_tokens": 20}))).output
    job.prompt_file.sha256 = bytes(32)
    with pytest.raises(ApplicationError) as error:
        await worker.run(job)
    assert error.value.type == "PROMPT_FILE_MISSING"
    # Each tenant has its own.
    job.prompt_file.CopyFrom(ref)
    with pytest.raises(ApplicationError) as error:
        await worker.run(job, workflow_id=workflow_id("u", "r", "acme"))
    assert error.value.type == "PROMPT_FILE_MISSING"
