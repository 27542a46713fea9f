"""Refinements and worlds with scripted answers, while anything is killed, are those of an undisturbed run.

`make chaos` kills 100 processes; the ordinary run kills one of each kind. CHAOS_SEED chooses the moments.
"""

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from temporalio.client import Client
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner

from deploy.local.stack import Stack
from jobs import names
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from payload_converter import data_converter
from pipelines.workflow import LLMPipelineWorkflow
from services.gateway.pipelines import catalogue as catalogue  # it registers the pipelines
from tests.support.files import bad_fields, new_file, upload
from tests.support.object_stores import s3_server
from tests.support.pipelines import (
    WITH_PIPELINES,
    Followed,
    answer,
    cancel,
    follow,
    new_pipeline,
    submit,
    until_pending,
)
from tests.support.refinements import refinement
from tests.support.stacks import stack_settings
from tests.support.worlds import MODELS, PAINTER, new_world, world_of

KILLS = int(os.environ.get("CHAOS_PIPELINE_KILLS", "5"))
CHANCE = random.Random(int(os.environ.get("CHAOS_SEED", "0")))
pytestmark = pytest.mark.timeout(600 + 60 * KILLS)
SUCCEEDED = pipeline_pb2.STEP_STATE_SUCCEEDED
PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
SERVICES = ("temporal", "nats", "gateway", "gpu-worker")


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    environment = {
        "gateway": {
            "GATEWAY_MODELS": json.dumps(MODELS),
            "GATEWAY_HEARTBEAT_TIMEOUT": "PT5S",
            "GATEWAY_RETRY_INTERVAL": "PT0.1S",
            # Each kill of a worker uses an attempt up.
            "GATEWAY_RETRY_ATTEMPTS": "20",
        },
        "gpu-worker": {
            "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 400, "context_tokens": 16384}',
            "GPU_WORKER_MAX_CONCURRENT": "16",
        },
    }
    folder = tmp_path_factory.mktemp("pipelines")
    stack = Stack(stack_settings(folder), only=SERVICES, environment=environment)
    stack.add("gpu-worker", {**PAINTER, "GPU_WORKER_ENGINE_OPTIONS": '{"seconds": 0.3, "width": 64, "height": 48}'})
    async with stack as running:
        yield running


@pytest.fixture(scope="module")
async def stub(stack: Stack) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield PipelineServiceStub(channel)


NEW: Any = {
    "refine": lambda key: refinement(key, 3, 4, 9),
    "world": lambda key: new_world(key, named="same", images=2, characters=3, posts=6),
}
"""A new pipeline of each kind, by its key."""


def new(kind: str, key: str) -> pipeline_pb2.PipelineRequest:
    pipeline: pipeline_pb2.PipelineRequest = NEW[kind](f"{kind}-{key}")
    return pipeline


def result_of(seen: Followed) -> pipeline_pb2.RefineResult:
    assert seen.result is not None, seen.status
    result = pipeline_pb2.RefineResult()
    assert seen.result.value.Unpack(result)
    return result


@pytest.mark.parametrize(
    ("key", "scores", "changes", "rounds", "best", "below"),
    [
        ("good", (5, 8.5), {}, 2, 2, False),
        ("default-threshold", (8,), {}, 1, 1, False),
        ("impatient", (6, 4, 5, 6), {}, 4, 1, True),
        ("few-rounds", (3, 4), {"max_rounds": 2}, 2, 2, True),
        ("own-numbers", (5, 4, 3), {"patience": 1, "quality_threshold": 6}, 2, 1, True),
    ],
)
async def test_rounds_end_with_a_good_draft_or_without_hope(
    stub: Any, key: str, scores: tuple[float, ...], changes: dict[str, Any], rounds: int, best: int, below: bool
) -> None:
    seen = await follow(stub, (await submit(stub, refinement(key, *scores, **changes))).pipeline_id, "edit")
    result = result_of(seen)
    found = (result.rounds, result.best_round, result.below_threshold, result.score)
    assert found == (rounds, best, below, scores[best - 1])
    assert result.article.encode() == seen.outputs["edit"] != b""
    leaves = {path for path, step in seen.steps.items() if step.workflow_id}
    assert leaves == {"edit", *(f"rounds/{n}/{step}" for n in range(1, rounds + 1) for step in ("write", "critique"))}
    assert json.loads(seen.steps[f"rounds/{best}/critique"].summary_json) == {"score": scores[best - 1]}


async def test_remarks_and_checked_facts_go_back_to_the_writer(stack: Stack, stub: Any) -> None:
    seen = await follow(stub, (await submit(stub, refinement("doubtful", 5, 9, doubtful=1))).pipeline_id, "**")
    assert seen.outputs["rounds/1/check"] == b"It never rains."
    assert "rounds/2/check" not in seen.steps
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        jobs: Any = LlmServiceStub(channel)
        asked = llm_pb2.GetJobRequest(workflow_id=seen.steps["rounds/2/write"].workflow_id)
        content = (await jobs.GetJob(asked)).job.messages[0].content
    for part in (seen.outputs["rounds/1/write"].decode(), "- weak 1", "- more", "- It never rains."):
        assert part in content


async def test_a_bad_refinement_is_refused(stub: Any) -> None:
    bad = refinement("bad", max_rounds=101, quality_threshold=11, patience=-1)
    bad.refine.models["nobody"] = "docstrings"
    del bad.refine.models["write"]
    assert await bad_fields(submit(stub, bad)) == {
        "pipeline.refine.max_rounds",
        "pipeline.refine.quality_threshold",
        "pipeline.refine.patience",
        "pipeline.refine.models",
        'pipeline.refine.models["nobody"]',
    }


@pytest.fixture(scope="module")
async def undisturbed(stub: Any) -> dict[str, Followed]:
    """A refinement and a world that nothing disturbs."""
    return {kind: await follow(stub, (await submit(stub, new(kind, "undisturbed"))).pipeline_id, "**") for kind in NEW}


async def test_pipelines_outlive_kills_of_anything_and_no_step_runs_twice(
    stack: Stack, stub: Any, undisturbed: dict[str, Followed]
) -> None:
    """Watchers continue by their cursors, without a gap. Text and pictures are those of an undisturbed run."""
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter, lazy=True)
    victims, kills = itertools.cycle(stack.processes), 0
    while kills < KILLS:
        runs = {kind: Watched(stub, await submitted(stub, new(kind, f"disturbed-{kills}"))) for kind in NEW}
        while kills < KILLS and not all(run.seen.ended for run in runs.values()):
            await news_of(*runs.values())
            # Any moment will do.
            await asyncio.sleep(CHANCE.random() * 0.5)
            victim = stack.processes[next(victims)]
            await victim.kill()
            await victim.start()
            await victim.wait_ready()
            kills += 1
        for kind, run in runs.items():
            await run.watching
            await assert_undisturbed(temporal, kind, run, undisturbed[kind])


class Watched:
    """A pipeline that is followed until it ends, whatever breaks."""

    def __init__(self, stub: Any, id_: str) -> None:
        self.id = id_
        self.seen = Followed()
        self.watching = asyncio.create_task(self._watch(stub))

    async def _watch(self, stub: Any) -> None:
        async with asyncio.timeout(600):
            while not self.seen.ended:
                await patiently(lambda: follow(stub, self.id, "**", known=self.seen))


async def news_of(*runs: Watched) -> None:
    """Wait until a watcher that is not at its end has got something new."""
    known = {run: run.seen.messages for run in runs}
    async with asyncio.timeout(600):
        while not any(run.seen.messages > known[run] for run in runs) and not all(  # noqa: ASYNC110
            run.seen.ended for run in runs
        ):
            await asyncio.sleep(0.01)


async def patiently(call: Any) -> Any:
    """Call until a gateway and Temporal answer."""
    async with asyncio.timeout(600):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() not in PASSING:
                    raise
                await asyncio.sleep(0.1)


async def submitted(stub: Any, pipeline: pipeline_pb2.PipelineRequest) -> str:
    status = await patiently(lambda: submit(stub, pipeline))
    return str(status.pipeline_id)


async def assert_undisturbed(temporal: Client, kind: str, run: Watched, undisturbed: Followed) -> None:
    """Assert that a pipeline has made what an undisturbed one makes, each step once."""
    seen = run.seen
    if kind == "refine":
        assert result_of(seen) == result_of(undisturbed)
    else:
        assert nameless(world_of(seen)) == nameless(world_of(undisturbed))
    assert seen.outputs == undisturbed.outputs
    assert {path: step.state for path, step in seen.steps.items()} == dict.fromkeys(undisturbed.steps, SUCCEEDED)
    history = await temporal.get_workflow_handle(run.id).fetch_history()
    # A gateway that takes a pipeline over runs its code again with what has happened.
    replayer = Replayer(
        workflows=[LLMPipelineWorkflow], data_converter=data_converter, workflow_runner=UnsandboxedWorkflowRunner()
    )
    await replayer.replay_workflow(history)
    started = [
        event.start_child_workflow_execution_initiated_event_attributes.workflow_id
        for event in history.events
        if event.HasField("start_child_workflow_execution_initiated_event_attributes")
    ]
    assert sorted(started) == sorted(f"{run.id}/{path}" for path, step in seen.steps.items() if step.workflow_id)


def nameless(world: pipeline_pb2.WorldResult) -> pipeline_pb2.WorldResult:
    """Return a world without the ids of its files, which are random. Their hashes stay."""
    for ref in (*world.images, *(post.image for post in world.posts)):
        ref.ClearField("file_id")
    return world


@pytest.mark.long
async def test_a_step_waits_for_a_store_that_is_away(tmp_path: Path) -> None:
    """Its admission reads the beginning of its prompt_file. After a minute the step failed, and its pipeline."""
    environment, store, away = WITH_PIPELINES, tmp_path / "store", tmp_path / "away"
    async with (
        Stack(stack_settings(tmp_path), only=SERVICES, environment=environment) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        stub: Any = PipelineServiceStub(channel)
        key = new_file()
        ref = (await upload(FileServiceStub(channel), key, b"Rain falls.")).ref
        id_ = (await submit(stub, new_pipeline("asked-reader", ref, user_id=key["file"].user_id))).pipeline_id
        await follow(stub, id_, until=lambda seen: "ask" in seen.steps and bool(seen.steps["ask"].question))
        shutil.move(store, away)
        await answer(stub, id_, "ask", "yes", approved=True)
        with pytest.raises(TimeoutError):
            # It has not ended when it had before.
            async with asyncio.timeout(70):
                await follow(stub, id_)
        shutil.move(away, store)
        seen = await follow(stub, id_)
        assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status


async def test_a_store_that_hangs_delays_no_cancel(tmp_path: Path) -> None:
    """The check of a step is tried once within a workflow task, which takes no cancel in meanwhile, and for 5 s only.

    It lasted for as long as the store hung, and the cancel came after up to 24 s.
    """
    async with s3_server("moto", tmp_path) as server:
        environment = {name: {**of, **server.environment} for name, of in WITH_PIPELINES.items()}
        async with (
            Stack(stack_settings(tmp_path), only=SERVICES, environment=environment) as stack,
            grpc.aio.insecure_channel(stack.address("gateway")) as channel,
        ):
            temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
            stub: Any = PipelineServiceStub(channel)
            key = new_file()
            ref = (await upload(FileServiceStub(channel), key, b"Rain falls.")).ref
            id_ = (await submit(stub, new_pipeline("asked-reader", ref, user_id=key["file"].user_id))).pipeline_id
            seen = await follow(stub, id_, until=lambda seen: "ask" in seen.steps and bool(seen.steps["ask"].question))
            server.process.send_signal(signal.SIGSTOP)
            try:
                await answer(stub, id_, "ask", "yes", approved=True)
                await until_pending(temporal, id_, names.ACTIVITY_ADMIT_STEP)
                await cancel(stub, id_)
                seen = await follow(stub, id_, known=seen)
            finally:
                server.process.send_signal(signal.SIGCONT)
            assert seen.status.state == llm_pb2.JOB_STATE_CANCELLED
            assert seen.steps["read"].state == pipeline_pb2.STEP_STATE_CANCELLED
