"""Workflows that are asked while a local activity runs can be replayed, whatever comes beside its end.

The first task of a gateway that takes a workflow over answers those who have asked meanwhile, and ends early. The code
gets the end of a local activity that it has started in the next task, with all that has come. A replay gets it before.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BoolValue
from temporalio import activity
from temporalio.client import Client, WorkflowFailureError, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.worker import HandleQueryInput, Worker, WorkflowInboundInterceptor

from jobs import names
from jobs.errors import EngineFailed
from jobs.start import job_start
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from pipelines import Pipeline, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from tests.support.files import until
from tests.support.jobs import new_job
from tests.support.replays import PIPELINE_ACTIVITIES, Handle, Intercepting, has, replay, start_pipeline, worker
from workflows.llm_job import LLMJobWorkflow
from workflows.llm_scheduled import LLMScheduledWorkflow

QUEUE, GPU = "asked", "asked-gpu"
STACK_TRACE = "__stack_trace"


@asynccontextmanager
async def asked(handle: Handle, query: str) -> AsyncIterator[None]:
    """Ask a workflow that no gateway has. The first one that takes it over while the context is open answers."""
    asking = asyncio.create_task(handle.query(query))
    # Nothing shows that Temporal has taken it in.
    await asyncio.sleep(0.3)
    yield
    await asking


class Meanwhile(Intercepting):
    """The local activity of a name. While it runs, something happens to its workflow, once.

    As an interceptor of the worker, it has the answer to a query come after the end of the activity.
    """

    def __init__(self, name: str, result: Any, happens: Callable[[], Coroutine[Any, Any, object]]) -> None:
        @activity.defn(name=name)
        async def run(*_: Any) -> Any:
            if not ended.is_set():
                await happens()
                ended.set()
            return result

        class Answering(WorkflowInboundInterceptor):
            async def handle_query(self, input: HandleQueryInput) -> Any:  # noqa: A002
                # Longer would be a deadlock to Temporal.
                ended.wait(1.5)
                # Nothing shows that Temporal has taken the end of the activity in.
                time.sleep(0.2)  # noqa: ASYNC251
                return await super().handle_query(input)

        super().__init__(Answering)
        ended, self.run = threading.Event(), run


def requesting(handle: Handle) -> Any:
    """Return RequestCancel."""

    @activity.defn(name=names.ACTIVITY_REQUEST_CANCEL)
    async def request() -> None:
        await handle.cancel()

    return request


async def started(temporal: Client, ends: Callable[[Handle], Coroutine[Any, Any, llm_pb2.JobResult]]) -> Handle:
    """Start a job whose only attempt ends as told. No gateway has it then."""
    job = new_job()
    start = job_start(job, internal_pb2.JobOptions(gpu_task_queue=GPU, notify_operator=False))
    handle: Handle = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE, job, id=start.id, memo=start.memo, task_queue=QUEUE, result_type=llm_pb2.JobResult
    )

    @activity.defn(name=names.ACTIVITY_RUN)
    async def run(request: internal_pb2.RunRequest) -> llm_pb2.JobResult:
        return await ends(handle)

    async with worker(temporal, QUEUE, [LLMJobWorkflow], []):
        await until(lambda: has(handle, "activity_task_scheduled_event_attributes"))
    async with Worker(temporal, task_queue=GPU, activities=[run]):
        await until(
            lambda: has(handle, "activity_task_completed_event_attributes", "activity_task_failed_event_attributes")
        )
    return handle


async def settles_cancelled(handle: Handle) -> llm_pb2.JobResult:
    await handle.signal(names.SIGNAL_CANCEL, llm_pb2.CancelRequest())
    return llm_pb2.JobResult(finish_reason=llm_pb2.FINISH_REASON_CANCELLED)


async def fails(handle: Handle) -> llm_pb2.JobResult:
    raise ApplicationError("scripted", type=EngineFailed.reason, non_retryable=True)


@pytest.mark.parametrize("kind", ["cancelled twice", "cancelled after its failure"])
async def test_a_job_that_is_cancelled_while_its_gateway_works_at_its_end(temporal: Client, kind: str) -> None:
    if kind == "cancelled twice":
        handle = await started(temporal, settles_cancelled)
        meanwhile = Meanwhile(names.ACTIVITY_FORGET_FEED, None, handle.cancel)
        other = Meanwhile(names.ACTIVITY_RECOVER_OUTPUT, llm_pb2.JobResult(), handle.describe)
    else:
        handle = await started(temporal, fails)
        meanwhile = Meanwhile(
            names.ACTIVITY_RECOVER_OUTPUT,
            llm_pb2.JobResult(),
            lambda: handle.signal(names.SIGNAL_CANCEL, llm_pb2.CancelRequest()),
        )
        other = Meanwhile(names.ACTIVITY_FORGET_FEED, None, handle.describe)
    activities = [meanwhile.run, other.run, requesting(handle)]
    async with (
        asked(handle, names.QUERY_GET_STATUS),
        worker(temporal, QUEUE, [LLMJobWorkflow], activities, [meanwhile]),
    ):
        with suppress(WorkflowFailureError):
            await handle.result()
    await replay(handle, LLMJobWorkflow)


async def test_a_run_of_a_schedule_whose_job_settles_while_it_asks_about_it(temporal: Client) -> None:
    @activity.defn(name=names.ACTIVITY_START_SCHEDULED_JOB)
    async def start(request: internal_pb2.StartScheduledJobRequest) -> internal_pb2.ScheduledJob:
        return internal_pb2.ScheduledJob(workflow_id="llmjob-u-r")

    @activity.defn(name=names.ACTIVITY_CHECK_SCHEDULED_JOB)
    async def check(request: internal_pb2.CheckScheduledJobRequest) -> internal_pb2.ScheduledJob:
        if not request.cancel_reason:
            return internal_pb2.ScheduledJob(state=llm_pb2.JOB_STATE_CANCELLED, ended=True)
        await handle.signal(names.SIGNAL_JOB_SETTLED)
        return internal_pb2.ScheduledJob(workflow_id="llmjob-u-r")

    handle: Handle = await temporal.start_workflow(
        names.SCHEDULED_WORKFLOW_TYPE,
        internal_pb2.ScheduledAction(),
        id=f"asked-{uuid.uuid4().hex}",
        task_queue=QUEUE,
    )
    async with worker(temporal, QUEUE, [LLMScheduledWorkflow], [start, check]):
        await until(lambda: has(handle, "timer_started_event_attributes"))
    await handle.cancel()
    async with asked(handle, STACK_TRACE), worker(temporal, QUEUE, [LLMScheduledWorkflow], [start, check]):
        await handle.result()
    await replay(handle, LLMScheduledWorkflow)


@pipeline("only-asking", BoolValue, BoolValue)
async def only_asking(llm: Pipeline, _: BoolValue) -> BoolValue:
    return BoolValue(value=await llm.approve("ask", "Go on?"))


@pytest.mark.parametrize("end", ["answered", "cancelled"])
async def test_a_pipeline_that_is_asked_and_told_while_it_closes(temporal: Client, end: str) -> None:
    """Its last answer is repeated, or it is cancelled by its signal and then by Temporal itself."""
    repeats: list[asyncio.Task[None]] = []

    async def tell() -> None:
        with suppress(WorkflowUpdateFailedError, RPCError):
            await handle.execute_update(names.UPDATE_ANSWER_STEP, answer, result_type=pipeline_pb2.StepStatus)

    async def tell_again() -> None:
        repeats.append(asyncio.create_task(tell()))
        # Nothing shows that Temporal has taken it in.
        await asyncio.sleep(0.3)

    async def asks() -> bool:
        record = await handle.query(names.QUERY_GET_RECORD, result_type=internal_pb2.PipelineRecord)
        return bool(record.status.root.counts.needs_answer)

    handle = await start_pipeline(temporal, QUEUE, "only-asking", BoolValue())
    answer = pipeline_pb2.AnswerStepRequest(pipeline_id=handle.id, path="ask", answer_id="a", approved=True)
    async with worker(temporal, QUEUE, [LLMPipelineWorkflow], [*PIPELINE_ACTIVITIES]):
        await until(asks)
    if end == "answered":
        repeats.append(asyncio.create_task(tell()))
        meanwhile = Meanwhile(names.ACTIVITY_FORGET_FEED, None, tell_again)
    else:
        await handle.signal(names.SIGNAL_CANCEL, llm_pb2.CancelRequest())
        meanwhile = Meanwhile(names.ACTIVITY_FORGET_FEED, None, handle.cancel)
    activities = [meanwhile.run, requesting(handle), *PIPELINE_ACTIVITIES[:-1]]
    async with (
        asked(handle, names.QUERY_GET_RECORD),
        worker(temporal, QUEUE, [LLMPipelineWorkflow], activities, [meanwhile]),
    ):
        with suppress(WorkflowFailureError):
            await handle.result()
        await asyncio.gather(*repeats)
    await replay(handle, LLMPipelineWorkflow)
