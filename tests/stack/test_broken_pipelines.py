"""Pipelines whose code is broken: each ends, with its error, and the gateway goes on."""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs.errors import reason_of
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.support.commands import run
from tests.support.files import bad_fields
from tests.support.pipelines import REGISTERED, Followed, answer, cancel, follow, new_pipeline, submit


@pytest.fixture(scope="module")
async def pipelines(stack: Stack) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield PipelineServiceStub(channel)


async def ended(pipelines: Any, name: str, value: str, **changes: Any) -> Followed:
    pipeline = new_pipeline(name, StringValue(value=value), **changes)
    return await follow(pipelines, (await submit(pipelines, pipeline)).pipeline_id)


def installed(folder: Path, code: str) -> str:
    """Install a module with this code and an entry point; return the PYTHONPATH with it."""
    package = folder / "extra-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[durable_llm.pipelines]\nextra = extra\n")
    (folder / "extra.py").write_text(code)
    return os.pathsep.join(filter(None, (str(folder), str(REGISTERED), os.environ.get("PYTHONPATH", ""))))


async def test_a_gateway_does_not_start_with_a_name_that_two_pipelines_have_or_a_broken_module(
    tmp_path: Path,
) -> None:
    twice = (
        "from google.protobuf.wrappers_pb2 import StringValue\n"
        "from pipelines import pipeline\n\n\n"
        '@pipeline("essay", StringValue, StringValue)\n'
        "async def mine(llm, topic):\n    return topic\n"
    )
    cases = {
        "two pipelines are named 'essay': ": twice,
        "No module named 'no_such_module'": "import no_such_module",
    }
    paths = [installed(tmp_path / str(number), code) for number, code in enumerate(cases.values())]
    # Each ends before it connects to anything.
    starting = (run(sys.executable, "-m", "services.gateway", PYTHONPATH=path) for path in paths)
    for words, end in zip(cases, await asyncio.gather(*starting), strict=True):
        assert end.status == 1
        assert words in end.errors
        assert "an entry point of durable_llm.pipelines" in end.errors


async def test_whatever_the_code_raises_its_pipeline_alone_ends(pipelines: Any) -> None:
    """sys.exit() in a pipeline ended the gateway, and the next one that ran its task."""
    words = {
        "exit": "SystemExit: scripted",
        "interrupt": "KeyboardInterrupt: scripted",
        "cancelled": "CancelledError: raised by the code itself",
        "generator": "GeneratorExit",
        "surrogate": "ValueError: half ? a pair",
        "wordless": "_Wordless: its text cannot be read (KeyError)",
        "long": "ValueError: long long",
    }
    values = [f"{where} {name}" for where in ("code", "map") for name in words]
    seen_of = await asyncio.gather(*(ended(pipelines, "raising", value) for value in values))
    for value, seen in zip(values, seen_of, strict=True):
        assert seen.status.state == llm_pb2.JOB_STATE_FAILED
        assert reason_of(seen.status.root.error) == "PROGRAM_ERROR"
        assert words[value.partition(" ")[2]] in seen.status.root.error.message


@pytest.mark.parametrize("limit", [1, 4])
async def test_a_map_may_keep_what_succeeds(pipelines: Any, limit: int) -> None:
    """An error is the result of its item, in its place, whether all items begin at once or in turn."""
    id_ = (await submit(pipelines, new_pipeline("partial", Int32Value(value=limit)))).pipeline_id
    seen = await follow(pipelines, id_)
    made = StringValue()
    assert seen.result is not None, seen.status.root.error
    assert seen.result.value.Unpack(made)
    assert made.value == "written, StepFailed, KeyError, written"
    assert (seen.status.root.counts.succeeded, seen.status.root.counts.failed) == (2, 1)


@pytest.mark.parametrize(
    ("how", "state"), [("fail", llm_pb2.JOB_STATE_FAILED), ("return", llm_pb2.JOB_STATE_SUCCEEDED)]
)
async def test_steps_that_the_code_has_left_are_cancelled(
    pipelines: Any, stub: LlmServiceStub, how: str, state: "llm_pb2.JobState.ValueType"
) -> None:
    seen = await ended(pipelines, "leaving", how)
    assert seen.status.state == state
    assert seen.steps["left"].state == pipeline_pb2.STEP_STATE_CANCELLED
    assert (seen.status.root.counts.running, seen.status.root.counts.cancelled) == (0, 1)
    job = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=seen.steps["left"].workflow_id))
    assert job.status.state == llm_pb2.JOB_STATE_CANCELLED


async def test_code_that_goes_on_after_a_cancel_is_stopped(pipelines: Any) -> None:
    id_ = (await submit(pipelines, new_pipeline("stubborn", StringValue()))).pipeline_id
    seen = await follow(pipelines, id_, until=lambda seen: "ask" in seen.steps and bool(seen.steps["ask"].question))
    await cancel(pipelines, id_)
    seen = await follow(pipelines, id_, known=seen)
    assert seen.status.state == llm_pb2.JOB_STATE_CANCELLED
    assert seen.steps.keys() == {"ask"}


async def test_code_that_goes_on_after_its_time_is_stopped(pipelines: Any) -> None:
    """It ends as TIMED_OUT, whether the pipeline's or the step's timer was the first."""
    seen = await ended(pipelines, "stubborn", "", total_timeout={"seconds": 1})
    assert seen.status.state == llm_pb2.JOB_STATE_TIMED_OUT
    assert reason_of(seen.status.root.error) == "TOTAL_TIMEOUT"
    assert seen.steps.keys() <= {"ask", "again"}


async def test_a_model_that_is_not_served_is_refused_at_once(pipelines: Any) -> None:
    """Its pipeline was accepted, and failed at the first step that named it."""
    request = pipeline_pb2.PipelineRequest(user_id="maker", request_id="unserved")
    request.refine.topic = "rain"
    request.refine.models.update(write="structured", critique="no-such-model")
    assert await bad_fields(submit(pipelines, request)) == {'pipeline.refine.models["critique"]'}
    request.refine.models.update(critique="structured")
    request.budget.cost_micros = 1000
    assert await bad_fields(submit(pipelines, request)) == {"pipeline.budget.cost_micros"}


async def test_a_workflow_task_may_take_as_long_as_on_a_busy_machine(pipelines: Any) -> None:
    """The SDK interrupted one after 2 s, in the middle of anything: its pipeline was stuck until the gateway ended."""
    seen = await ended(pipelines, "dozing", "awake")
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status.root.error


async def test_hundreds_of_steps_that_begin_at_once_are_split_among_workflow_tasks(
    pipelines: Any, temporal: Client
) -> None:
    """A task that takes 2 s is a deadlock for the SDK: 1,500 steps in one ended a busy gateway's pipeline for good."""
    seen = await follow(pipelines, (await submit(pipelines, new_pipeline("wide", Int32Value(value=450)))).pipeline_id)
    made = Int32Value()
    assert seen.result is not None, seen.status.root.error
    assert seen.result.value.Unpack(made)
    assert (made.value, seen.status.root.counts.failed) == (450, 450)
    history = await temporal.get_workflow_handle(seen.status.pipeline_id).fetch_history()
    timers = [event for event in history.events if event.HasField("timer_fired_event_attributes")]
    markers = Counter(
        event.marker_recorded_event_attributes.workflow_task_completed_event_id
        for event in history.events
        if event.HasField("marker_recorded_event_attributes")
    )
    assert len(timers) >= 2
    # The tree is published as well.
    assert max(markers.values()) < 250


async def test_of_ten_answers_at_once_one_counts(pipelines: Any) -> None:
    id_ = (await submit(pipelines, new_pipeline("careful", StringValue(value="x")))).pipeline_id
    path = "review/approve"
    await follow(pipelines, id_, until=lambda seen: path in seen.steps)
    given = [answer(pipelines, id_, path, f"answer-{number}", approved=False) for number in range(10)]
    answers = await asyncio.gather(*given, return_exceptions=True)
    taken = [number for number, one in enumerate(answers) if not isinstance(one, BaseException)]
    refused = {one.code() for one in answers if isinstance(one, grpc.aio.AioRpcError)}
    # The pipeline ends with the answer. A busy worker may not tell its steps just then.
    assert len(taken) == 1
    assert refused <= {grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.UNAVAILABLE}
    again = await answer(pipelines, id_, path, f"answer-{taken[0]}", approved=False)
    assert (again.HasField("approved"), again.approved) == (True, False)
    assert again.summary_json == '{"approved": false}'


async def test_temporal_ends_a_pipeline_that_nothing_else_ends(pipelines: Any, temporal: Client) -> None:
    request = new_pipeline("stubborn", StringValue(), total_timeout={"seconds": 60})
    id_ = (await submit(pipelines, request)).pipeline_id
    description = await temporal.get_workflow_handle(id_).describe()
    longest = description.raw_description.execution_config.workflow_execution_timeout.ToTimedelta()
    assert timedelta(minutes=1) < longest < timedelta(days=8)
    await cancel(pipelines, id_)
