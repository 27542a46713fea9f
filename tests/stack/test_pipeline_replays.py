"""A pipeline whose gateway dies is replayed by another one, whatever order its local activities have ended in."""

import asyncio
import uuid
from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from temporalio import activity, workflow
from temporalio.client import Client, WorkflowHandle, WorkflowQueryFailedError
from temporalio.service import RPCError
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner, Worker

from jobs import names
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from payload_converter import data_converter
from pipelines import Pipeline, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from runtime.worker_versioning import WorkerVersioning
from tests.support.files import until

QUEUE, OTHER = "replays", "replays-other"


@pipeline("shouting", StringValue, StringValue)
async def shouting(llm: Pipeline, text: StringValue) -> StringValue:
    """Run an activity, and then a job."""
    shouted = await llm.step("shout", "Shout", text.value, task_queue=OTHER, result_type=str)
    return StringValue(value=(await llm.generate("write", model="docstrings", prompt=shouted)).text)


@activity.defn(name="Shout")
async def shout(text: str) -> str:
    return text.upper()


class LocalActivities:
    """The local activities, of which the one ends while the other one runs."""

    def __init__(self, last: str) -> None:
        self._last = last
        self._other = asyncio.Event()

    @activity.defn(name=names.ACTIVITY_PUBLISH_PIPELINE)
    async def publish(self, change: internal_pb2.PipelineChange) -> None:
        await self._end(names.ACTIVITY_PUBLISH_PIPELINE)

    @activity.defn(name=names.ACTIVITY_ADMIT_STEP)
    async def admit(self, job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
        await self._end(names.ACTIVITY_ADMIT_STEP)
        return internal_pb2.JobOptions()

    async def _end(self, name: str) -> None:
        if name == self._last:
            await self._other.wait()
            # The code of the workflow has run after the other one.
            await asyncio.sleep(0.3)
        else:
            self._other.set()


def worker(client: Client, last: str) -> Worker:
    local = LocalActivities(last)
    return Worker(
        client,
        task_queue=QUEUE,
        plugins=[WorkerVersioning(None)],
        workflows=[LLMPipelineWorkflow],
        activities=[local.publish, local.admit],
        workflow_runner=UnsandboxedWorkflowRunner(),
    )


async def has(handle: WorkflowHandle[object, object], field: str) -> bool:
    return any(event.HasField(field) for event in (await handle.fetch_history()).events)  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [names.ACTIVITY_PUBLISH_PIPELINE, names.ACTIVITY_ADMIT_STEP])
async def test_a_query_while_local_activities_run_does_not_keep_a_pipeline_from_its_replay(
    temporal: Client, last: str
) -> None:
    """The first task of a gateway that takes a pipeline over answers those who have asked meanwhile, and ends early."""
    request = pipeline_pb2.PipelineRequest(user_id="u", request_id=uuid.uuid4().hex)
    request.custom.name = "shouting"
    request.custom.input.Pack(StringValue(value="rain"))
    handle = await temporal.start_workflow(
        names.PIPELINE_WORKFLOW_TYPE,
        internal_pb2.PipelineRun(pipeline=request),
        id=f"llmpipe-u-{request.request_id}",
        task_queue=QUEUE,
    )
    async with worker(temporal, names.ACTIVITY_ADMIT_STEP):
        await until(lambda: has(handle, "activity_task_scheduled_event_attributes"))
        await until(lambda: has(handle, "timer_fired_event_attributes"))
    async with Worker(temporal, task_queue=OTHER, activities=[shout]):
        await until(lambda: has(handle, "activity_task_completed_event_attributes"))
    asking = asyncio.create_task(handle.query(names.QUERY_GET_RECORD, result_type=internal_pb2.PipelineRecord))
    # Nothing shows that Temporal has taken it in.
    await asyncio.sleep(0.3)
    async with worker(temporal, last):
        await asking
        await until(lambda: has(handle, "start_child_workflow_execution_initiated_event_attributes"))
    history = await handle.fetch_history()
    await handle.terminate()
    replayer = Replayer(
        workflows=[LLMPipelineWorkflow], data_converter=data_converter, workflow_runner=UnsandboxedWorkflowRunner()
    )
    await replayer.replay_workflow(history)


@pipeline("crossing", StringValue, StringValue)
async def crossing(llm: Pipeline, text: StringValue) -> StringValue:
    """Run jobs beside activities: either may end at any time."""

    async def part(part: Pipeline, number: int) -> None:
        for round_ in range(3):
            if (number + round_) % 2:
                await part.step(f"shout{round_}", "Shout", text.value, task_queue=QUEUE, result_type=str)
            else:
                await part.generate(f"write{round_}", model="docstrings", prompt=text.value)

    await llm.map("parts", range(20), part, limit=6)
    return text


@activity.defn(name=names.ACTIVITY_ADMIT_STEP)
async def admit_step(job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
    return internal_pb2.JobOptions()


@activity.defn(name=names.ACTIVITY_ADMIT_STEPS)
async def admit_steps(request: internal_pb2.AdmitStepsRequest) -> internal_pb2.AdmitStepsResponse:
    return internal_pb2.AdmitStepsResponse(options=[internal_pb2.JobOptions()], numbers=[0] * len(request.jobs))


@activity.defn(name=names.ACTIVITY_PUBLISH_PIPELINE)
async def publish(change: internal_pb2.PipelineChange) -> None:
    """Nobody follows."""


@activity.defn(name=names.ACTIVITY_FORGET_FEED)
async def forget(*_: Any) -> None:
    """There is no feed."""


@workflow.defn(name=names.JOB_WORKFLOW_TYPE)
class Job:
    """A job that ends at once."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest) -> llm_pb2.JobResult:
        return llm_pb2.JobResult(output="x", finish_reason=llm_pb2.FINISH_REASON_STOP)


async def test_a_pipeline_that_is_asked_all_the_time_can_be_replayed(temporal: Client) -> None:
    """A query may end a workflow task before the code has got the result of a local activity."""
    request = pipeline_pb2.PipelineRequest(user_id="u", request_id=uuid.uuid4().hex)
    request.custom.name = "crossing"
    request.custom.input.Pack(StringValue(value="rain"))
    async with Worker(
        temporal,
        task_queue=QUEUE,
        plugins=[WorkerVersioning(None)],
        workflows=[LLMPipelineWorkflow, Job],
        activities=[shout, admit_step, admit_steps, publish, forget],
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        handle = await temporal.start_workflow(
            names.PIPELINE_WORKFLOW_TYPE,
            internal_pb2.PipelineRun(pipeline=request),
            id=f"llmpipe-u-{request.request_id}",
            task_queue=QUEUE,
        )

        async def ask() -> None:
            while True:
                with suppress(RPCError, WorkflowQueryFailedError):
                    await handle.query(names.QUERY_GET_RECORD, result_type=internal_pb2.PipelineRecord)

        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(ask()) for _ in range(3)]
            await handle.result()
            for task in asking:
                task.cancel()
    replayer = Replayer(
        workflows=[LLMPipelineWorkflow], data_converter=data_converter, workflow_runner=UnsandboxedWorkflowRunner()
    )
    await replayer.replay_workflow(await handle.fetch_history())
