"""A worker dies in the middle of an answer, and no watcher gets a byte twice or misses one.

Each round kills or stops the worker that runs a job, at a random place of the output, while another worker runs. There
are three watchers: one from the start, one that comes late, and one that reconnects at random offsets. Each must hold
exactly the output of an uninterrupted greedy run, without a rewind. `make chaos` runs many rounds.
"""

import asyncio
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator
from typing import NamedTuple

import grpc
import pytest

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.engines import vllm_variable
from tests.support.jobs import Seen, new_job, run_job, watch
from tests.support.stacks import FAST, SOON_LOST, stack_settings
from tests.support.watchers import watch_in_pieces, when_output_reaches

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
TOKENS = 300
PARAMS = {"temperature": 0.0, "max_tokens": TOKENS, "min_tokens": TOKENS}


ENGINES = [
    "simulated",
    pytest.param("torch", marks=pytest.mark.long),
    pytest.param("vllm", marks=pytest.mark.vllm),
]


class Crashing(NamedTuple):
    stack: Stack
    stub: LlmServiceStub

    def worker_of(self, status: llm_pb2.JobStatus) -> Process:
        """Return the process of the worker that the status names."""
        pid = int(status.progress.worker.rpartition("-")[2])
        (process,) = [process for process in self.stack.processes.values() if process.pid == pid]
        return process

    async def start_workers(self) -> None:
        """Start the workers that earlier rounds ended, without waiting until they are ready."""
        for process in self._workers:
            if not process.running:
                await process.start()

    async def workers_ready(self) -> None:
        for process in self._workers:
            await process.wait_ready()

    @property
    def _workers(self) -> list[Process]:
        return [process for name, process in self.stack.processes.items() if name.startswith("gpu-worker")]


@pytest.fixture(scope="module", params=ENGINES)
async def crashing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Crashing]:
    engine = request.param
    if engine != "simulated":
        pytest.importorskip(engine)
    worker = {**FAST["gpu-worker"], "GPU_WORKER_SHUTDOWN_GRACE": "PT0.2S"}
    if engine != "simulated":
        worker["GPU_WORKER_ENGINE_OPTIONS"] = '{"threads": 1}' if engine == "torch" else vllm_variable()
    gateway = {**FAST["gateway"], **SOON_LOST}
    settings = stack_settings(tmp_path_factory.mktemp(f"crash-{engine}"), engine=engine, gpu_workers=2)
    only = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    async with (
        Stack(settings, only=only, environment={**FAST, "gateway": gateway, "gpu-worker": worker}) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        yield Crashing(stack, LlmServiceStub(channel))


def ends_of(seen: Seen) -> list[str]:
    """Return why each attempt has ended, after a check of their workers and times."""
    attempts = seen.final.result.attempts
    assert len({attempt.worker for attempt in attempts[-2:]}) == 2
    for attempt, following in itertools.pairwise(attempts):
        assert attempt.start_time.ToDatetime() <= attempt.end_time.ToDatetime() <= following.start_time.ToDatetime()
    assert attempts[-1].worker == seen.final.result.metadata.worker
    assert attempts[-1].start_time == seen.final.status.start_time
    return [llm_pb2.AttemptEnd.Name(attempt.end).removeprefix("ATTEMPT_END_") for attempt in attempts]


async def interrupted(
    crashing: Crashing,
    prompt: str,
    how: signal.Signals,
    chance: random.Random,
    to: LlmServiceStub | None = None,
    **params: int,
) -> list[Seen]:
    """Run a job, interrupt its worker at a random place of the output, and return what three watchers saw."""
    stub = crashing.stub
    await crashing.start_workers()
    undisturbed = await run_job(stub, new_job(prompt, params={**PARAMS, **params}))
    expected = undisturbed.output
    await crashing.workers_ready()
    request = llm_pb2.SubmitRequest(job=new_job(prompt, params={**PARAMS, **params}))
    id_ = (await (to or stub).Submit(request)).workflow_id
    early = asyncio.create_task(watch(stub, id_))
    pieces = asyncio.create_task(watch_in_pieces(stub, id_, chance))
    status = await when_output_reaches(stub, id_, chance.randrange(1, len(expected) * 3 // 4))
    worker = crashing.worker_of(status)
    worker.signal(how)
    late = asyncio.create_task(watch(stub, id_))
    watchers = [await early, await late, await pieces]
    await worker.wait()
    for seen in watchers:
        assert seen.states[-1] == "SUCCEEDED"
        assert seen.output == expected
        assert seen.final.result.output.encode() == expected
        assert seen.rewinds == 0
        assert seen.logprobs == [*seen.final.result.logprobs]
        assert [place.chosen.token for place in seen.logprobs] == [p.chosen.token for p in undisturbed.logprobs]
        # A model that reads its own text again may compute other last digits than one that has just written it.
        for place, other in zip(seen.logprobs, undisturbed.logprobs, strict=True):
            assert place.chosen.logprob == pytest.approx(other.chosen.logprob, abs=0.01)
        assert seen.final.result.metadata.output_tokens == TOKENS
        assert seen.final.status.first_token_time == status.first_token_time
    return watchers


@pytest.mark.timeout(120 + 60 * ROUNDS)
async def test_a_killed_workers_jobs_continue(crashing: Crashing) -> None:
    """After SIGKILL the next attempt continues after the last token that reached the feed."""
    chance = random.Random(0)
    for number in range(ROUNDS):
        for seen in await interrupted(crashing, f"Return the {number}", signal.SIGKILL, chance):
            assert seen.final.status.attempt >= 2
            assert ends_of(seen)[-2:] == ["WORKER_LOST", "FINISHED"]


async def test_a_killed_workers_logprobs_go_on(crashing: Crashing) -> None:
    """The feed holds them: those of each token come once, and the result has all of them."""
    watchers = await interrupted(crashing, "Return the logprobs", signal.SIGKILL, random.Random(2), logprobs=5)
    for seen in watchers:
        assert seen.final.status.attempt >= 2
        assert len(seen.logprobs) == TOKENS


async def test_a_stopping_worker_hands_its_jobs_over(crashing: Crashing) -> None:
    """After SIGTERM, as in a deploy, the job continues immediately at another worker and uses up no attempt.

    The gateway's heartbeat timeout is minutes long, so a job that waits for it fails this test.
    """
    patient = crashing.stack.add("gateway", {"GATEWAY_HEARTBEAT_TIMEOUT": "PT200S"})
    await patient.start()
    await patient.wait_ready()
    async with grpc.aio.insecure_channel(crashing.stack.address(patient.name)) as channel:
        watchers = await interrupted(
            crashing, "Return the list", signal.SIGTERM, random.Random(1), LlmServiceStub(channel)
        )
    for seen in watchers:
        assert seen.final.status.attempt == 1
        assert ends_of(seen) == ["HANDED_OVER", "FINISHED"]
        gaps = [m.status.progress.updated_at.ToNanoseconds() for m in seen.messages if m.HasField("status")]
        gaps = sorted(time for time in gaps if time)
        assert max((b - a for a, b in itertools.pairwise(gaps)), default=0) < 190e9, "a heartbeat timeout passed"
    await patient.terminate()
