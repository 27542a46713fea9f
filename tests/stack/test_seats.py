"""Background jobs make way for others: they pause between two tokens, and nobody gets a byte of them twice.

A worker has one seat here, or two. The output of a job that pauses is compared with that of the same job undisturbed.
"""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import common_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gpu_worker.engines.simulated import answer, decode
from tests.support.engines import vllm_variable
from tests.support.jobs import Seen, new_job, run_job, unpack, until_message, until_output, watch
from tests.support.scrapes import scrape
from tests.support.stacks import FAST, stack_settings

PATIENCE = 120
TOKENS = 300
WAITS = "[[fault:hang@150:once]]"
"""Keeps a job from its end until it has paused, however late the other one comes."""
PROMPT = f"Say something. {WAITS}"
HIGH, BACKGROUND = common_pb2.JOB_CLASS_HIGH, common_pb2.JOB_CLASS_BACKGROUND
QUEUED = llm_pb2.JOB_STATE_QUEUED


@pytest.fixture(scope="module")
async def installation(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    only = ("temporal", "nats", "gateway", "notifier")
    gateway = {**FAST["gateway"], "GATEWAY_HEARTBEAT_TIMEOUT": "PT3S"}
    settings = stack_settings(tmp_path_factory.mktemp("seats"))
    async with Stack(settings, only=only, environment={**FAST, "gateway": gateway}) as stack:
        yield stack


@pytest.fixture(scope="module")
async def client(installation: Stack) -> AsyncIterator[LlmServiceStub]:
    async with grpc.aio.insecure_channel(installation.address("gateway")) as channel:
        yield LlmServiceStub(channel)


@asynccontextmanager
async def worker(stack: Stack, seats: int = 1, wait: str = "PT2M", **environment: str) -> AsyncIterator[Process]:
    """Run a worker that keeps a paused job for `wait` while the context is open."""
    own = {"GPU_WORKER_MAX_CONCURRENT": str(seats), "GPU_WORKER_PAUSE_WAIT": wait, **environment}
    process = stack.add("gpu-worker", own)
    await process.start()
    await process.wait_ready()
    try:
        yield process
    finally:
        if process.running:
            await process.terminate()


async def submit(client: LlmServiceStub, job: llm_pb2.JobRequest) -> str:
    return (await client.Submit(llm_pb2.SubmitRequest(job=job), timeout=20)).workflow_id


async def background_job(client: LlmServiceStub, prompt: str = PROMPT, **fields: object) -> str:
    """Submit a background job and return its id once it has output."""
    job = new_job(prompt, params={"max_tokens": TOKENS}, job_class=BACKGROUND, **fields)
    id_ = await submit(client, job)
    await until_output(client, id_)
    return id_


async def interactive_job(client: LlmServiceStub, tokens: int = 8000) -> str:
    """Submit a job that needs a seat and return its id once it has output."""
    id_ = await submit(client, new_job(params={"max_tokens": tokens}, job_class=HIGH))
    await until_output(client, id_)
    return id_


async def displaced_job(
    client: LlmServiceStub, paused: Callable[[llm_pb2.StreamStatusResponse], bool], **fields: object
) -> tuple[str, "asyncio.Task[Seen]", str]:
    """Submit a background job, and then one that takes its seat. Return them once the first has paused.

    Returns the id of the first, what a reader from its first output on will have seen, and the id of the other.
    """
    id_ = await background_job(client, **fields)
    watching = asyncio.create_task(watch(client, id_))
    other = await interactive_job(client)
    await until_message(client, id_, paused)
    return id_, watching, other


async def cancel(client: LlmServiceStub, id_: str) -> None:
    await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_), timeout=20)


def is_paused(message: llm_pb2.StreamStatusResponse | llm_pb2.GetStatusResponse) -> bool:
    return message.status.state == QUEUED and message.status.progress.stage == "paused"


def in_queue(message: llm_pb2.StreamStatusResponse | llm_pb2.GetStatusResponse) -> bool:
    return is_paused(message) and not message.status.progress.worker


async def status_of(client: LlmServiceStub, id_: str) -> llm_pb2.GetStatusResponse:
    response: llm_pb2.GetStatusResponse = await client.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=20)
    return response


async def listed_worker(client: LlmServiceStub) -> llm_pb2.WorkerInfo:
    """Return the one worker once ListWorkers knows it: its job may be quicker than the news of it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            response = await client.ListWorkers(llm_pb2.ListWorkersRequest(), timeout=20)
            if response.workers:
                (info,) = response.workers
                return info
            await asyncio.sleep(0.1)


async def until_status(client: LlmServiceStub, id_: str) -> llm_pb2.GetStatusResponse:
    """Return the answer of GetStatus that first says that the job is paused."""
    async with asyncio.timeout(PATIENCE):
        while True:
            if is_paused(response := await status_of(client, id_)):
                return response
            await asyncio.sleep(0.1)


def undisturbed(prompt: str = PROMPT) -> bytes:
    """Return the output of a job undisturbed."""
    ids = itertools.islice(answer(prompt, llm_pb2.SamplingParams(), None), TOKENS)
    # A character that was cut is no text.
    return decode(list(ids)).rstrip("\ufffd").encode()


def assert_whole(seen: Seen, expected: bytes, ends: list[str], pauses: int = 1) -> None:
    """Assert that the job has its output, got no byte twice, and has used up one attempt."""
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.output == expected
    assert seen.final.result.output.encode() == expected
    metadata = seen.final.result.metadata
    assert (seen.rewinds, metadata.rewinds, metadata.pauses, metadata.output_tokens) == (0, 0, pauses, TOKENS)
    assert ends_of(seen) == ends
    # At 200 tokens a second at most.
    assert metadata.engine_time.ToTimedelta().total_seconds() > 0.9 * TOKENS / 200


def ends_of(seen: Seen) -> list[str]:
    return [llm_pb2.AttemptEnd.Name(attempt.end).removeprefix("ATTEMPT_END_") for attempt in seen.final.result.attempts]


async def test_a_background_job_pauses_and_goes_on_at_the_same_token(
    installation: Stack, client: LlmServiceStub
) -> None:
    async with worker(installation) as process:
        expected = undisturbed()
        id_, early, other = await displaced_job(client, is_paused)
        late = asyncio.create_task(watch(client, id_))
        status = (await until_status(client, id_)).status
        assert status.progress.worker.endswith(f"-{process.pid}")
        assert 0 < status.progress.output_bytes < len(expected)
        assert not status.HasField("error")
        info = await listed_worker(client)
        assert [*info.task_queues] == ["llm-gpu-activities", "llm-gpu-activities.background"]
        scraped = await scrape(installation, process.name)
        assert scraped.total("llm_job_pauses_total") == 1
        assert scraped.total("llm_engine_seats", llm_job_class="high") == 1
        assert scraped.total("llm_engine_seats") == 1
        assert scraped.total("llm_engine_seat_release_duration_seconds_count") == 1
        await cancel(client, other)
        for seen in (await early, await late):
            assert_whole(seen, expected, ["FINISHED"])
            states = [state for state in seen.states if state != "NOTIFYING"]
            assert states[-3:] == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_a_long_pause_ends_at_another_worker(installation: Stack, client: LlmServiceStub) -> None:
    """The job goes back to the queue, where it may wait longer than its queue timeout."""
    queue = llm_pb2.JobTimeouts(queue=Duration(seconds=8))
    async with worker(installation, wait="PT0.5S"):
        expected = undisturbed()
        id_, seen, other = await displaced_job(client, in_queue, timeouts=queue)
        response = await status_of(client, id_)
        assert in_queue(response)
        assert 0 < response.status.progress.percent < 100
        assert (response.status.attempt, response.status.HasField("error")) == (1, False)
        # Only time shows that a timer does not run. Temporal's are up to a second late.
        await asyncio.sleep(10)
        assert in_queue(await status_of(client, id_))
        async with worker(installation):
            assert_whole(await seen, expected, ["PAUSED", "FINISHED"])
        assert (await seen).final.status.attempt == 1
        await cancel(client, other)


@pytest.mark.parametrize("wait", ["PT2M", "PT0.5S"], ids=["at-the-worker", "in-the-queue"])
async def test_a_cancel_ends_a_paused_job(installation: Stack, client: LlmServiceStub, wait: str) -> None:
    async with worker(installation, wait=wait):
        expected = undisturbed()
        id_, watching, other = await displaced_job(client, in_queue if wait == "PT0.5S" else is_paused)
        await cancel(client, id_)
        seen = await watching
        assert seen.states[-1] == "CANCELLED"
        assert 0 < len(seen.output) < len(expected)
        assert expected.startswith(seen.output)
        assert seen.final.result.output.encode() == seen.output
        assert seen.final.result.metadata.pauses == 1
        assert seen.final.result.metadata.HasField("engine_time")
        assert (await status_of(client, other)).status.state == llm_pb2.JOB_STATE_RUNNING
        await cancel(client, other)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_paused_job_survives_its_worker(
    installation: Stack, client: LlmServiceStub, how: signal.Signals
) -> None:
    async with worker(installation, GPU_WORKER_SHUTDOWN_GRACE="PT0.2S") as process:
        expected = undisturbed()
        id_, watching, other = await displaced_job(client, is_paused)
        await until_status(client, id_)
        process.signal(how)
        await process.wait()
        await cancel(client, other)
        async with worker(installation):
            end = "WORKER_LOST" if how == signal.SIGKILL else "HANDED_OVER"
            assert_whole(await watching, expected, [end, "FINISHED"])


async def test_background_jobs_keep_a_seat(installation: Stack, client: LlmServiceStub) -> None:
    """Of two seats others get one. The younger background job pauses, and the older one ends meanwhile."""
    async with worker(installation, seats=2, GPU_WORKER_ENGINE_OPTIONS='{"tokens_per_second": 40}'):
        prompts = ("older", f"younger {WAITS}")
        expected = [undisturbed(prompt) for prompt in prompts]
        older, younger = [await background_job(client, prompt) for prompt in prompts]
        watching = [asyncio.create_task(watch(client, id_)) for id_ in (older, younger)]
        others = [await submit(client, new_job(params={"max_tokens": 8000}, job_class=HIGH)) for _ in range(3)]
        await until_message(client, younger, is_paused)
        seen = await watching[0]
        assert_whole(seen, expected[0], ["FINISHED"], pauses=0)
        states = [(await status_of(client, id_)).status.state for id_ in others]
        assert states.count(llm_pb2.JOB_STATE_RUNNING) == 1
        assert_whole(await watching[1], expected[1], ["FINISHED"])
        for id_ in others:
            await cancel(client, id_)


async def test_a_pause_does_not_count_against_the_time_of_the_job(installation: Stack, client: LlmServiceStub) -> None:
    """Neither against its run timeout nor against its budget of engine time."""
    async with worker(installation):
        expected = undisturbed()
        limits = llm_pb2.JobTimeouts(run=Duration(seconds=20))
        budget = common_pb2.Budget(engine_time=Duration(seconds=15))
        _, watching, other = await displaced_job(client, in_queue, timeouts=limits, budget=budget)
        await cancel(client, other)
        assert_whole(await watching, expected, ["PAUSED", "FINISHED"])


@pytest.mark.parametrize("wait", ["PT2M", "PT0.5S"], ids=["at-the-worker", "in-the-queue"])
async def test_a_budget_is_exact_across_a_pause(installation: Stack, client: LlmServiceStub, wait: str) -> None:
    async with worker(installation, wait=wait):
        expected = undisturbed()
        budget = common_pb2.Budget(output_tokens=TOKENS - 20)
        _, watching, other = await displaced_job(client, in_queue if wait == "PT0.5S" else is_paused, budget=budget)
        await cancel(client, other)
        seen = await watching
        result = seen.final.result
        assert seen.states[-1] == "FAILED"
        assert unpack(seen.final.status.error)["ErrorInfo"].reason == "BUDGET_SPENT"
        assert (result.metadata.output_tokens, result.metadata.pauses) == (TOKENS - 20, 1)
        assert (seen.rewinds, result.metadata.wasted_tokens) == (0, 0)
        assert expected.startswith(seen.output)
        assert result.output.encode() == seen.output


OF_ENGINE = {"torch": '{"threads": 1}', "vllm": vllm_variable()}


@pytest.mark.parametrize(
    "engine", [pytest.param("torch", marks=pytest.mark.long), pytest.param("vllm", marks=pytest.mark.vllm)]
)
async def test_the_output_of_a_real_model_is_that_of_a_run_without_pauses(
    installation: Stack, client: LlmServiceStub, engine: str
) -> None:
    """Greedy or seeded. A seeded job of vLLM starts over at a pause, and generates the same."""
    pytest.importorskip(engine)
    environment = {"GPU_WORKER_ENGINE": engine, "GPU_WORKER_ENGINE_OPTIONS": OF_ENGINE[engine]}
    async with worker(installation, **environment):
        for params in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 7}):
            length = {"max_tokens": 800, "min_tokens": 800, **params}
            expected = (await run_job(client, new_job("Return the", params=length))).output
            id_ = await submit(client, new_job("Return the", params=length, job_class=BACKGROUND))
            await until_output(client, id_)
            watching = asyncio.create_task(watch(client, id_))
            for _ in range(3):
                await run_job(client, new_job("Return", params={"max_tokens": 5}, job_class=HIGH))
            seen = await watching
            assert seen.final.result.metadata.pauses > 0
            assert (seen.output, seen.rewinds, ends_of(seen)) == (expected, 0, ["FINISHED"])
