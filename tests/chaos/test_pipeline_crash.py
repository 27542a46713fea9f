"""Refinements with scripted answers, undisturbed and while processes are killed: the same result, no step twice."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from payload_converter import data_converter
from tests.support.files import bad_fields
from tests.support.pipelines import Followed, follow, submit
from tests.support.stacks import stack_settings

pytestmark = pytest.mark.timeout(600)
SUCCEEDED = pipeline_pb2.STEP_STATE_SUCCEEDED
MODELS = [
    {
        "name": "docstrings",
        "context_tokens": 8192,
        "max_output_tokens": 8192,
        "default_max_tokens": 300,
        "structured_output": True,
    }
]


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    environment = {
        "gateway": {
            "GATEWAY_MODELS": json.dumps(MODELS),
            "GATEWAY_HEARTBEAT_TIMEOUT": "PT10S",
            "GATEWAY_RETRY_INTERVAL": "PT0.1S",
        },
        "gpu-worker": {"GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 400}', "GPU_WORKER_MAX_CONCURRENT": "16"},
    }
    services = ("temporal", "nats", "gateway", "gpu-worker")
    folder = tmp_path_factory.mktemp("pipelines")
    async with Stack(stack_settings(folder), only=services, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
async def stub(stack: Stack) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield PipelineServiceStub(channel)


def refinement(key: str, *scores: float, doubtful: int = 0, **changes: Any) -> pipeline_pb2.PipelineRequest:
    """Return a refinement whose critiques have these scores; that of the round `doubtful` finds facts doubtful."""
    topic = "rain"
    for number, score in enumerate(scores, 1):
        critique = {
            "score": score,
            "strengths": [],
            "weaknesses": [f"weak {number}"],
            "suggestions": ["more"],
            "facts_doubtful": number == doubtful,
        }
        topic += f"[[when Criticise the draft of round {number} : {json.dumps(critique)}]]"
    topic += "[[when Check the facts: It never rains.]]"
    pipeline = pipeline_pb2.PipelineRequest(user_id="alice", request_id=key)
    pipeline.refine.CopyFrom(pipeline_pb2.RefineSpec(topic=topic, models={"write": "docstrings"}, **changes))
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


async def restart(process: Process) -> None:
    await process.kill()
    await process.start()
    await process.wait_ready()


async def test_a_refinement_outlives_what_dies_and_no_step_runs_twice(stack: Stack, stub: Any) -> None:
    """A watcher continues by its cursor. The text is that of an undisturbed run, byte for byte."""
    scores = (3, 4, 9)
    undisturbed = await follow(stub, (await submit(stub, refinement("undisturbed", *scores))).pipeline_id, "**")
    id_ = (await submit(stub, refinement("disturbed", *scores))).pipeline_id
    seen = Followed()

    async def watch() -> None:
        while not seen.ended:
            try:
                await follow(stub, id_, "**", known=seen)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL):
                    raise
                await asyncio.sleep(0.2)

    async def until_output(path: str) -> None:
        while path not in seen.outputs and not watching.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    for path, name in (
        ("rounds/1/write", "gateway"),
        ("rounds/2/write", "gpu-worker"),
        ("rounds/3/write", "gateway"),
        ("edit", "gpu-worker"),
    ):
        await until_output(path)
        await restart(stack.processes[name])
    await watching
    assert result_of(seen) == result_of(undisturbed)
    assert seen.outputs == undisturbed.outputs
    assert {path: step.state for path, step in seen.steps.items()} == dict.fromkeys(undisturbed.steps, SUCCEEDED)
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    history = await temporal.get_workflow_handle(id_).fetch_history()
    started = [
        event.start_child_workflow_execution_initiated_event_attributes.workflow_id
        for event in history.events
        if event.HasField("start_child_workflow_execution_initiated_event_attributes")
    ]
    assert sorted(started) == sorted(f"{id_}/{path}" for path in seen.outputs)
