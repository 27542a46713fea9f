"""A pipeline whose gateway dies is replayed by another one, whatever order its local activities have ended in."""

import asyncio
import uuid

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from temporalio import activity
from temporalio.client import Client, WorkflowHandle
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
