"""Pipelines whose code resists: a cancel and the end of their time stop them, and what they did is undone."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from temporalio import activity, workflow
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.testing import ActivityEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from deploy.local.stack import Stack
from jobs import names
from jobs.errors import reason_of
from jobs.ids import pipeline_workflow_id
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from services.gateway.quotas.ended_jobs import LedgerActivities
from tests.support.files import PATIENCE
from tests.support.pipelines import cancel, follow, get, new_pipeline, submit

SIGNALED = "workflow_execution_signaled_event_attributes"
SUCCEEDED = pipeline_pb2.STEP_STATE_SUCCEEDED
CANCELLED = pipeline_pb2.STEP_STATE_CANCELLED


@pytest.fixture(scope="module")
async def pipelines(stack: Stack) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield PipelineServiceStub(channel)


class Turns:
    """An activity that ends its work when it is cancelled, once it may."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.stopping = asyncio.Event()
        self.may_end = asyncio.Event()

    @activity.defn(name="Turn")
    async def turn(self, number: int) -> int:
        self.began.set()
        try:
            while True:
                activity.heartbeat()
                await asyncio.sleep(0.1)
        except asyncio.CancelledError:
            self.stopping.set()
            await asyncio.wait_for(self.may_end.wait(), PATIENCE)
        return number


@asynccontextmanager
async def taking_turns(temporal: Client, queue: str) -> AsyncIterator[tuple[Turns, Struct]]:
    turns, spec = Turns(), Struct()
    spec.update({"queue": queue})
    async with Worker(temporal, task_queue=queue, activities=[turns.turn]):
        yield turns, spec


async def test_a_cancel_counts_although_the_step_ends_well(pipelines: Any, temporal: Client) -> None:
    """A step that has ended its work keeps it, and no further step begins."""
    async with taking_turns(temporal, "turns-1") as (turns, spec):
        id_ = (await submit(pipelines, new_pipeline("unyielding", spec))).pipeline_id
        await asyncio.wait_for(turns.began.wait(), PATIENCE)
        await cancel(pipelines, id_)
        await asyncio.wait_for(turns.stopping.wait(), PATIENCE)
        turns.began.clear()
        turns.may_end.set()
        seen = await follow(pipelines, id_, until=lambda seen: seen.ended or turns.began.is_set())
    assert not turns.began.is_set(), "the next step has begun after the cancel"
    assert seen.status.state == llm_pb2.JOB_STATE_CANCELLED
    assert {path: step.state for path, step in seen.steps.items()} == {"turns": SUCCEEDED, "turns/0": SUCCEEDED}


async def test_what_cancelled_steps_have_used_is_in_the_usage(
    pipelines: Any, stub: LlmServiceStub, temporal: Client
) -> None:
    """Of steps that are jobs, and of jobs in pipelines within; for the tenant's quota as well."""
    spec = Struct()
    spec.update({"code": "lasting", "topics": ["a", "b"]})
    ids = []
    for request in (new_pipeline("fan", Int32Value(value=3)), new_pipeline("nesting", spec)):
        ids.append((await submit(pipelines, request)).pipeline_id)
    jobs = [f"{ids[0]}/parts/{number}/write" for number in range(3)]
    jobs += [f"{ids[1]}/parts/{number}/write/write" for number in range(2)]
    await asyncio.wait_for(asyncio.gather(*(_generates(stub, job) for job in jobs)), PATIENCE)
    used = []
    for id_, paths in zip(ids, (jobs[:3], jobs[3:]), strict=True):
        await cancel(pipelines, id_)
        seen = await follow(pipelines, id_)
        assert seen.status.state == llm_pb2.JOB_STATE_CANCELLED
        ended = [await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=job), timeout=PATIENCE) for job in paths]
        tokens = [job.result.metadata.output_tokens for job in ended]
        assert [seen.steps[f"parts/{number}/write"].usage.output_tokens for number in range(len(paths))] == tokens
        assert all(tokens)
        root = seen.status.root
        assert root.usage.output_tokens == sum(tokens)
        assert root.usage.engine_time.ToNanoseconds() > 0
        assert root.counts.cancelled == len(paths)
        if id_ == ids[1]:
            inner = (await get(pipelines, f"{id_}/parts/0/write")).status.root
            assert inner.error.message == root.error.message == "enough"
        used.append(sum(tokens))
    request = internal_pb2.FindEndedJobsRequest(workflow_ids=ids)
    found = await ActivityEnvironment().run(LedgerActivities(temporal).find_ended_jobs, request)
    assert dict(zip(found.ended, found.output_tokens, strict=True)) == dict(zip(ids, used, strict=True))


async def _generates(stub: LlmServiceStub, job: str) -> None:
    """Wait until a step's job has generated something."""
    while True:
        try:
            async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=job), timeout=PATIENCE):
                if message.delta.text:
                    return
        except grpc.aio.AioRpcError as error:
            # The step has not begun.
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise


@pytest.mark.parametrize("fast", [timedelta(hours=1), -timedelta(hours=1)], ids=["ahead", "behind"])
async def test_a_gateway_with_a_wrong_clock_changes_no_time_of_a_pipeline(
    pipelines: Any, temporal: Client, fast: timedelta
) -> None:
    """One whose gateway was behind had no time at all, and one whose gateway was ahead had too much."""
    known = (await submit(pipelines, new_pipeline("essay", StringValue(value="rain")))).pipeline_id
    described = await temporal.get_workflow_handle(known).describe()
    run = internal_pb2.PipelineRun(pipeline=new_pipeline("careful", StringValue(value="rain")))
    now, within = described.start_time + fast, timedelta(seconds=5)
    run.options.create_time.FromDatetime(now)
    run.options.expire_time.FromDatetime(now + within)
    id_ = pipeline_workflow_id(run.pipeline.user_id, run.pipeline.request_id, "")
    await temporal.start_workflow(names.PIPELINE_WORKFLOW_TYPE, run, id=id_, task_queue=described.task_queue)
    seen = await follow(pipelines, id_)
    root = seen.status.root
    assert seen.status.state == llm_pb2.JOB_STATE_TIMED_OUT
    assert seen.status.expire_time.ToDatetime(UTC) - root.start_time.ToDatetime(UTC) == within
    assert root.end_time.ToDatetime(UTC) >= seen.status.expire_time.ToDatetime(UTC)
    started = (await temporal.get_workflow_handle(id_).describe()).start_time
    assert abs(root.start_time.ToDatetime(UTC) - started) < timedelta(milliseconds=1)


@pytest.mark.parametrize("own", [True, False])
async def test_a_step_ends_with_its_job_when_its_own_time_is_over(
    pipelines: Any, stub: LlmServiceStub, temporal: Client, own: bool
) -> None:
    """It ended once Temporal had ended the job's workflow, up to a minute later. Where the pipeline's time is over, the
    pipeline has not failed."""
    pipeline = new_pipeline("refine", total_timeout=None if own else {"seconds": 3})
    pipeline.refine.topic = "rain"
    pipeline.refine.models.update(write="idle", critique="structured")
    if own:
        pipeline.refine.step_timeouts["write"].FromSeconds(2)
    seen = await follow(pipelines, (await submit(pipelines, pipeline)).pipeline_id)
    assert seen.status.state == (llm_pb2.JOB_STATE_FAILED if own else llm_pb2.JOB_STATE_TIMED_OUT)
    assert reason_of(seen.status.root.error) == "TOTAL_TIMEOUT"
    if own:
        id_ = seen.steps["rounds/1/write"].workflow_id
        job = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=PATIENCE)
        assert (job.status.state, reason_of(job.status.error)) == (llm_pb2.JOB_STATE_TIMED_OUT, "TOTAL_TIMEOUT")
        assert (await temporal.get_workflow_handle(id_).describe()).status == WorkflowExecutionStatus.FAILED


async def test_a_broken_compensation_keeps_no_pipeline_open(pipelines: Any) -> None:
    """The others do their work nevertheless. A limit of 0 would let nothing begin, so it is an error."""
    seen = await follow(pipelines, (await submit(pipelines, new_pipeline("untidy", Struct()))).pipeline_id)
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert reason_of(seen.status.root.error) == "PROGRAM_ERROR"
    assert "limit must be 1 or more" in seen.status.root.error.message
    assert {path: step.state for path, step in seen.steps.items()} == {"undo": SUCCEEDED}


async def test_a_task_that_the_code_has_left_begins_no_step_while_compensations_run(pipelines: Any) -> None:
    """It did, and no limit of the pipeline bound it."""
    seen = await follow(pipelines, (await submit(pipelines, new_pipeline("forgetful", StringValue()))).pipeline_id)
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert {path: step.state for path, step in seen.steps.items()} == {"undo": SUCCEEDED}


async def test_a_cancel_of_a_step_whose_workflow_is_just_being_started_counts(pipelines: Any, temporal: Client) -> None:
    """Code that catches the failure of a step took it for one, and its part went on."""
    id_ = (await submit(pipelines, new_pipeline("hasty", StringValue(value="rain")))).pipeline_id
    seen = await follow(pipelines, id_)
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status.root.error
    assert {path: step.state for path, step in seen.steps.items() if path != "parts"} == {
        "parts/0": CANCELLED,
        "parts/0/write": CANCELLED,
    }
    events = (await temporal.get_workflow_handle(id_).fetch_history()).events
    assert not any(event.HasField("start_child_workflow_execution_initiated_event_attributes") for event in events)


@workflow.defn(name=names.PIPELINE_WORKFLOW_TYPE)
class Waits:
    """A pipeline that waits for ever."""

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: False)

    @workflow.query(name=names.QUERY_GET_RECORD)
    def get_record(self) -> internal_pb2.PipelineRecord:
        return internal_pb2.PipelineRecord()


@pytest.mark.long
async def test_a_cancel_is_accepted_although_the_pipeline_does_not_answer(pipelines: Any, temporal: Client) -> None:
    """Where many are cancelled at once, some tell their status late. The cancel is durable by then."""
    id_, queue = f"llmpipe-silent-{uuid.uuid4().hex}", uuid.uuid4().hex
    async with Worker(temporal, task_queue=queue, workflows=[Waits], workflow_runner=UnsandboxedWorkflowRunner()):
        handle = await temporal.start_workflow(names.PIPELINE_WORKFLOW_TYPE, id=id_, task_queue=queue)
        await handle.query(names.QUERY_GET_RECORD)
    status = await cancel(pipelines, id_)
    assert (status.pipeline_id, status.state, status.cancel_requested) == (id_, llm_pb2.JOB_STATE_RUNNING, True)
    signals = [event async for event in handle.fetch_history_events() if event.HasField(SIGNALED)]
    assert [event.workflow_execution_signaled_event_attributes.signal_name for event in signals] == [
        names.SIGNAL_CANCEL
    ]
    await handle.terminate()
