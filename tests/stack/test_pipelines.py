"""Pipelines over gRPC: steps that are jobs, one stream with one cursor, answers, a budget, one cancel."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

from deploy.local.stack import Stack
from durable_llm import AsyncClient
from durable_llm import Client as Client_
from jobs import names
from jobs.errors import reason_of
from jobs.pipelines import PATH_RULE
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.support.commands import run
from tests.support.files import PATIENCE, bad_fields, refusal
from tests.support.jobs import details_of
from tests.support.paths import ROOT
from tests.support.pipelines import REGISTERED, activities, answer, cancel, follow, get, new_pipeline, submit

NEEDS_ANSWER = pipeline_pb2.STEP_STATE_NEEDS_ANSWER
SUCCEEDED = pipeline_pb2.STEP_STATE_SUCCEEDED


@pytest.fixture(scope="module")
async def pipelines(stack: Stack) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield PipelineServiceStub(channel)


def text_of(result: pipeline_pb2.PipelineResult) -> str:
    value = StringValue()
    assert result.value.Unpack(value)
    return value.value


def test_the_first_example_of_the_docs_is_a_pipeline_of_this_stack() -> None:
    page = (ROOT / "docs" / "pipelines.md").read_text()
    assert page.split("```python registered\n")[1].split("```")[0] == (REGISTERED / "essay.py").read_text()


async def test_steps_are_jobs_and_their_output_comes_by_one_stream(
    pipelines: Any, stub: LlmServiceStub, temporal: Client
) -> None:
    """A stream that breaks continues by its cursor: no byte twice, none missed."""
    pipeline = new_pipeline("essay", StringValue(value="rain"), project_id="weather")
    started = await submit(pipelines, pipeline)
    id_ = started.pipeline_id
    assert id_ == f"llmpipe-maker--{pipeline.user_id.partition('-')[2]}-{pipeline.request_id}"
    assert (started.state, started.name) == (llm_pb2.JOB_STATE_RUNNING, "essay")
    seen = await follow(pipelines, id_, "outline", "parts/*/write", until=lambda seen: seen.messages == 4)
    while not seen.ended:
        before = seen.messages
        await follow(
            pipelines, id_, "outline", "parts/*/write", known=seen, until=lambda now, at=before: now.messages > at + 5
        )
    leaves = ["outline", *(f"parts/{number}/write" for number in range(3))]
    assert seen.steps.keys() == {*leaves, "parts", *(f"parts/{number}" for number in range(3))}
    assert {step.state for step in seen.steps.values()} == {SUCCEEDED}
    for path in leaves:
        assert seen.steps[path].workflow_id == f"{id_}/{path}"
        job = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=f"{id_}/{path}"))
        assert job.result.output.encode() == seen.outputs[path] != b""
        assert not job.status.notifications
        assert seen.steps[path].usage.output_tokens == job.result.metadata.output_tokens
    assert seen.outputs.keys() == {*leaves}
    assert seen.result is not None
    assert text_of(seen.result) == "\n\n".join(seen.outputs[path].decode() for path in leaves[1:])
    root = seen.status.root
    assert (root.counts.total, root.counts.succeeded, root.usage.output_tokens) == (4, 4, 210)
    read = await get(pipelines, id_)
    assert (read.status, read.result) == (seen.status, seen.result)
    assert {step.path: step for step in read.steps} == seen.steps
    assert [step.path for step in (await get(pipelines, id_, "parts/1")).steps] == ["parts/1", "parts/1/write"]
    # A whole stream of the ended pipeline brings the same.
    again = await follow(pipelines, id_, "**")
    assert (again.outputs, again.steps, again.result) == (seen.outputs, seen.steps, seen.result)
    # The steps are found as jobs, the pipeline in its own list.
    listed = await stub.List(llm_pb2.ListRequest(user_id=pipeline.user_id))
    assert {job.status.workflow_id for job in listed.jobs} == {f"{id_}/{path}" for path in leaves}
    page = await pipelines.ListPipelines(pipeline_pb2.ListPipelinesRequest(user_id=pipeline.user_id))
    assert [*page.pipelines] == [seen.status]
    # A repeat finds it, and another one under its key is refused.
    assert await submit(pipelines, pipeline) == seen.status
    pipeline.project_id = "other"
    assert await refusal(submit(pipelines, pipeline)) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    history = await temporal.get_workflow_handle(id_).fetch_history()
    assert len(history.events) < 100, "a pipeline of four steps has cost too many events"


async def test_an_answer_counts_once_and_what_was_done_is_undone(pipelines: Any) -> None:
    id_ = (await submit(pipelines, new_pipeline("careful", StringValue(value="this")))).pipeline_id
    path = "review/approve"
    waits = lambda seen: path in seen.steps and seen.steps[path].state == NEEDS_ANSWER  # noqa: E731
    seen = await follow(pipelines, id_, until=waits)
    assert seen.steps[path].question == "May I generate from 'this'?"
    assert seen.steps["review"].counts.needs_answer == 1
    assert (await get(pipelines, id_)).status.root.counts.needs_answer == 1
    assert await refusal(answer(pipelines, id_, "other", "a", approved=True)) == ("NOT_FOUND", names.STEP_NOT_FOUND)
    refused = await refusal(answer(pipelines, id_, "review", "a", approved=True))
    assert refused == ("FAILED_PRECONDITION", names.STEP_NOT_WAITING)
    given = await answer(pipelines, id_, path, "a", approved=True)
    assert (given.approved, given.summary_json) == (True, '{"approved": true}')

    async def repeat() -> None:
        """The same answer is no error. Another one is, whatever its id."""
        assert (await answer(pipelines, id_, path, "a", approved=True)).path == path
        for other, approved in (("b", True), ("b", False), ("a", False)):
            refused = await refusal(answer(pipelines, id_, path, other, approved=approved))
            assert refused == ("ALREADY_EXISTS", names.STEP_ANSWERED), (other, approved)

    await repeat()
    seen = await follow(pipelines, id_, known=seen)
    await repeat()
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert not seen.status.root.counts.needs_answer
    assert reason_of(seen.status.root.error) == "ENGINE_FAILED"
    assert reason_of(seen.steps["optional"].error) == "INVALID_JOB"
    states = {path: step.state for path, step in seen.steps.items() if "/" in path or path in ("first", "second")}
    assert states == {
        "review/approve": SUCCEEDED,
        "first": SUCCEEDED,
        "second": pipeline_pb2.STEP_STATE_FAILED,
        "undo/1": SUCCEEDED,
        "undo/2": SUCCEEDED,
    }
    assert seen.steps["undo/2"].end_time.ToNanoseconds() <= seen.steps["undo/1"].start_time.ToNanoseconds()


async def test_the_python_client_runs_pipelines(stack: Stack) -> None:
    """With asyncio and without."""
    request = new_pipeline("careful", StringValue(value="this"))
    with Client_(stack.address("gateway")) as client:
        id_ = client.pipelines.submit(request).pipeline_id
        for message in client.pipelines.watch(id_):
            if any(step.state == NEEDS_ANSWER for step in message.steps):
                break
        assert client.pipelines.answer(id_, "review/approve", approved=False).summary_json
        assert text_of(client.pipelines.result(id_).result) == "not approved"
        assert [found.pipeline_id for found in client.pipelines.list(user_id=request.user_id)] == [id_]
        assert client.pipelines.cancel(id_).state == llm_pb2.JOB_STATE_SUCCEEDED
        assert [step.path for step in client.pipelines.get(id_, "review").steps] == ["review", "review/approve"]
    request = new_pipeline("essay", StringValue(value="snow"))
    async with AsyncClient(stack.address("gateway")) as client_:
        started = await client_.pipelines.submit(request)
        messages = [message async for message in client_.pipelines.watch(started.pipeline_id, ["parts/*/write"])]
        assert messages[-1].HasField("result")
        assert {message.delta.path for message in messages if message.HasField("delta")} <= {
            f"parts/{number}/write" for number in range(3)
        }
        late = [message async for message in client_.pipelines.watch(started.pipeline_id, cursor=messages[-2].cursor)]
        assert late[-1].result == messages[-1].result


async def test_a_cancel_stops_all_steps_and_keeps_what_they_made(
    pipelines: Any, stub: LlmServiceStub, temporal: Client, stack: Stack
) -> None:
    id_ = (await submit(pipelines, new_pipeline("leaves", Int32Value(value=20)))).pipeline_id
    seen = await follow(pipelines, id_, "**", until=lambda seen: len(seen.outputs) == 20)
    assert (await cancel(pipelines, id_)).cancel_requested
    seen = await follow(pipelines, id_, "**", known=seen)
    assert seen.status.state == llm_pb2.JOB_STATE_CANCELLED
    assert "enough" in seen.status.root.error.message
    assert seen.status.root.counts.cancelled == 20
    for number in range(20):
        path = f"parts/{number}/write"
        assert seen.steps[path].state == pipeline_pb2.STEP_STATE_CANCELLED
        job = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=f"{id_}/{path}"))
        assert job.status.state == llm_pb2.JOB_STATE_CANCELLED
        assert job.result.output.encode() == seen.outputs[path] != b""
    # The code ends with a CancelledError, which is no failure of it.
    log = stack.processes["gateway"].log.splitlines()
    assert not [line for line in log if "the code of a pipeline has failed: CancelledError" in line]
    events = (await temporal.get_workflow_handle(id_).fetch_history()).events
    # All were admitted at once.
    called = activities(events)
    assert (called[names.ACTIVITY_ADMIT_STEPS], called[names.ACTIVITY_ADMIT_STEP]) == (1, 0)
    # Each was asked once, although the first one that ends ends the fan-out.
    requests = [
        event.request_cancel_external_workflow_execution_initiated_event_attributes.workflow_execution.workflow_id
        for event in events
        if event.HasField("request_cancel_external_workflow_execution_initiated_event_attributes")
    ]
    assert sorted(requests) == sorted(f"{id_}/parts/{number}/write" for number in range(20))
    # An ended pipeline does not change.
    assert (await cancel(pipelines, id_)).state == llm_pb2.JOB_STATE_CANCELLED


async def test_a_fan_out_that_is_too_wide_fails_before_its_first_step(pipelines: Any) -> None:
    """It would fail after 2,000 jobs, and what these have cost."""
    seen = await follow(pipelines, (await submit(pipelines, new_pipeline("fan", Int32Value(value=2001)))).pipeline_id)
    assert reason_of(seen.status.root.error) == "TOO_MANY_STEPS"
    assert "2001 items, and 2000 of 2000 steps are left" in seen.status.root.error.message
    assert seen.status.root.counts.total == 0


async def test_no_step_has_a_name_that_means_something_else_in_the_address_of_a_job(pipelines: Any) -> None:
    for path in ("status", "parts/stream", "cancel/write", "parts/deliveries/write"):
        seen = await follow(
            pipelines, (await submit(pipelines, new_pipeline("deep", StringValue(value=path)))).pipeline_id
        )
        assert seen.status.state == llm_pb2.JOB_STATE_FAILED
        assert reason_of(seen.status.root.error) == "PROGRAM_ERROR"
        assert seen.status.root.error.message == f"ValueError: no step can have the path {path!r}: {PATH_RULE}"
        assert not seen.steps


async def test_changes_of_the_tree_come_at_most_four_times_a_second(pipelines: Any) -> None:
    id_ = (await submit(pipelines, new_pipeline("restless", Int32Value(value=20)))).pipeline_id
    seen = await follow(pipelines, id_)
    assert seen.steps["first"].summary_json == '{"change": 19}'
    root = seen.status.root
    seconds = (root.end_time.ToNanoseconds() - root.start_time.ToNanoseconds()) / 1e9
    # The tree at the begin of the stream, the first change, the last tree, and the result.
    assert seen.messages <= 4 * seconds + 4


async def test_a_budget_bounds_all_steps_together(pipelines: Any) -> None:
    pipeline = new_pipeline("spending", Int32Value(value=5), budget={"output_tokens": 20})
    seen = await follow(pipelines, (await submit(pipelines, pipeline)).pipeline_id)
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert reason_of(seen.status.root.error) == "BUDGET_SPENT"
    assert [seen.steps[f"steps/{number}"].usage.output_tokens for number in range(3)] == [8, 8, 4]
    assert seen.status.root.usage.output_tokens == 20
    assert seen.status.left.output_tokens == -1


async def test_a_pipeline_ends_when_its_time_is_over(pipelines: Any) -> None:
    pipeline = new_pipeline("careful", StringValue(value="x"), total_timeout={"seconds": 2})
    seen = await follow(pipelines, (await submit(pipelines, pipeline)).pipeline_id)
    assert seen.status.state in (llm_pb2.JOB_STATE_TIMED_OUT, llm_pb2.JOB_STATE_FAILED)
    assert reason_of(seen.status.root.error) == "TOTAL_TIMEOUT"


async def test_a_step_is_any_activity_and_broken_code_ends_its_pipeline(pipelines: Any, temporal: Client) -> None:
    @activity.defn(name="Shout")
    async def shout(text: str) -> str:
        return text.upper()

    spec = Struct()
    spec.update({"text": "hello", "queue": "shouters"})
    id_ = (await submit(pipelines, new_pipeline("foreign", spec))).pipeline_id
    # It says that no worker has it.
    queued = lambda seen: "shout" in seen.steps and seen.steps["shout"].queued  # noqa: E731
    seen = await follow(pipelines, id_, until=queued)
    assert (await get(pipelines, id_)).steps[0].queued
    async with Worker(temporal, task_queue="shouters", activities=[shout]):
        seen = await follow(pipelines, id_, known=seen)
    assert seen.result is not None
    assert not seen.steps["shout"].queued
    assert text_of(seen.result) == "HELLO"
    assert not seen.steps["shout"].workflow_id
    history = await temporal.get_workflow_handle(id_).fetch_history()
    (scheduled,) = [
        event.activity_task_scheduled_event_attributes
        for event in history.events
        if event.HasField("activity_task_scheduled_event_attributes")
    ]
    # Otherwise nobody would notice that the worker of a try has died.
    assert scheduled.start_to_close_timeout.ToSeconds() == 600
    retries = scheduled.retry_policy
    intervals = (retries.initial_interval.ToSeconds(), retries.maximum_interval.ToSeconds())
    assert (*intervals, retries.maximum_attempts) == (1, 60, 3)
    seen = await follow(pipelines, (await submit(pipelines, new_pipeline("broken", spec))).pipeline_id)
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert reason_of(seen.status.root.error) == "PROGRAM_ERROR"
    assert seen.status.root.error.message == "KeyError: 'no such thing as hello'"


async def test_a_step_whose_worker_dies_is_tried_again(pipelines: Any, temporal: Client) -> None:
    @activity.defn(name="Shout")
    async def shout(text: str) -> str:
        if activity.info().attempt == 1:
            # As one whose worker was killed, it never ends.
            activity.raise_complete_async()
        return f"{text} {activity.info().attempt}"

    spec = Struct()
    spec.update({"text": "hello", "queue": "dying-shouters", "heartbeat_timeout": 1})
    async with Worker(temporal, task_queue="dying-shouters", activities=[shout]):
        seen = await follow(pipelines, (await submit(pipelines, new_pipeline("foreign", spec))).pipeline_id)
    assert seen.result is not None
    assert text_of(seen.result) == "hello 2"


async def test_a_step_that_was_cancelled_after_its_worker_died_is_cancelled(pipelines: Any, temporal: Client) -> None:
    """Temporal ends it by its timeout: it was shown with TOTAL_TIMEOUT, although the pipeline had a day."""

    @activity.defn(name="Shout")
    async def shout(text: str) -> str:
        activity.raise_complete_async()

    spec = Struct()
    spec.update({"text": "hello", "queue": "dead-shouters", "heartbeat_timeout": 1})
    async with Worker(temporal, task_queue="dead-shouters", activities=[shout]):
        id_ = (await submit(pipelines, new_pipeline("foreign", spec))).pipeline_id
        await follow(pipelines, id_, until=lambda seen: "shout" in seen.steps)
        await cancel(pipelines, id_)
        seen = await follow(pipelines, id_)
    assert seen.status.state == llm_pb2.JOB_STATE_CANCELLED
    step = seen.steps["shout"]
    assert step.state == pipeline_pb2.STEP_STATE_CANCELLED
    assert reason_of(step.error) == "CANCELLED"
    assert seen.status.root.counts.cancelled == 1


async def test_a_gateway_without_a_pipeline_leaves_it_to_one_that_has_it(stack: Stack) -> None:
    """As while an operator rolls a new pipeline out."""
    queue = {"GATEWAY_WORKFLOW_QUEUE": "rolled-out"}
    calls, bare, having = (
        stack.add("gateway", {**queue, **more}) for more in ({"GATEWAY_ROLE": "api"}, {"PYTHONPATH": ""}, {})
    )
    try:
        for process in (calls, bare):
            await process.start()
            await process.wait_ready()
        async with grpc.aio.insecure_channel(stack.address(calls.name)) as channel, asyncio.timeout(PATIENCE):
            stub: Any = PipelineServiceStub(channel)
            id_ = (await submit(stub, new_pipeline("deep", StringValue(value="write")))).pipeline_id
            while "no pipeline is named 'deep' here" not in bare.log:  # noqa: ASYNC110  nothing notifies
                await asyncio.sleep(0.1)
            # Otherwise it takes some of the next tasks, too, each of which comes later than the one before.
            await bare.terminate()
            await having.start()
            seen = await follow(stub, id_, patience=PATIENCE)
            # Now no gateway has it any more.
            await having.terminate()
            await bare.start()
            await bare.wait_ready()
            tree = await run(
                *(sys.executable, "-m", "durable_llm", "pipeline", "tree", id_),
                DURABLE_LLM_ADDRESS=stack.address(calls.name),
            )
    finally:
        for process in (calls, bare, having):
            await process.terminate()
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert tree.status == 0
    assert "SUCCEEDED" in tree.output
    assert f"No steps can be shown, of {seen.status.root.counts.total}: " in tree.errors


async def test_what_is_wrong_with_a_request_is_named(pipelines: Any) -> None:
    bad = new_pipeline("nobody", user_id="-")
    bad.total_timeout.seconds = 10**9
    assert await bad_fields(submit(pipelines, bad)) == {
        "pipeline.user_id",
        "pipeline.total_timeout",
        "pipeline.custom.name",
    }
    # It had two bounds, of which one was too wide.
    ages = new_pipeline("essay", total_timeout={"seconds": 100 * 365 * 24 * 3600})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await submit(pipelines, ages)
    (violation,) = details_of(refused.value)["BadRequest"].field_violations
    assert violation.description == "must be at most 7 days, 0:00:00"
    wrong = new_pipeline("essay", Int32Value(value=1))
    assert await bad_fields(submit(pipelines, wrong)) == {"pipeline.custom.input"}
    assert await bad_fields(submit(pipelines, pipeline_pb2.PipelineRequest())) >= {"pipeline.spec"}
    request = pipeline_pb2.StreamPipelineRequest(pipeline_id="llmpipe-a-b", cursor="x", follow=["a//b"])
    assert await bad_fields(anext(aiter(pipelines.StreamPipeline(request, timeout=PATIENCE)))) == {"follow[0]"}
    assert await refusal(get(pipelines, "llmpipe-a-b")) == ("NOT_FOUND", "PIPELINE_NOT_FOUND")
    del request.follow[:]
    assert await bad_fields(anext(aiter(pipelines.StreamPipeline(request, timeout=PATIENCE)))) == {"cursor"}
