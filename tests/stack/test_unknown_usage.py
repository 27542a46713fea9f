"""A step that Temporal or an operator has ended ends as such, although nobody knows now what it has used."""

import uuid
from contextlib import suppress
from typing import Any

from google.protobuf.wrappers_pb2 import StringValue
from temporalio import activity, workflow
from temporalio.client import Client, WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner, Worker

from jobs import names
from jobs.errors import Terminated
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from payload_converter import data_converter
from pipelines import Pipeline, StepFailed, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from runtime.worker_versioning import WorkerVersioning
from tests.support.files import until

QUEUE = "unknown-usage"


@pipeline("stopped", StringValue, StringValue)
async def stopped(llm: Pipeline, text: StringValue) -> StringValue:
    """Return why a job has failed."""
    try:
        await llm.generate("write", model="docstrings", prompt=text.value)
    except StepFailed as error:
        return StringValue(value=error.reason)
    return text


@activity.defn(name=names.ACTIVITY_ADMIT_STEP)
async def admit(job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
    return internal_pb2.JobOptions()


@activity.defn(name=names.ACTIVITY_PUBLISH_PIPELINE)
async def publish(change: internal_pb2.PipelineChange) -> None:
    """Nobody watches."""


@activity.defn(name=names.ACTIVITY_FORGET_FEED)
async def forget(*_: Any) -> None:
    """There is no feed."""


@activity.defn(name=names.ACTIVITY_LEFT_USAGE)
async def left_usage(workflow_id: str) -> pipeline_pb2.PipelineResult:
    raise ApplicationError("scripted", non_retryable=True)


@workflow.defn(name=names.JOB_WORKFLOW_TYPE)
class Waiting:
    """A job that waits for ever."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest) -> llm_pb2.JobResult:
        await workflow.wait_condition(lambda: False)
        return llm_pb2.JobResult()


async def test_a_step_that_an_operator_has_ended_says_so_although_its_usage_cannot_be_asked_for(
    temporal: Client,
) -> None:
    """The gateway asks Temporal, which may be away for longer than the gateway asks."""
    request = pipeline_pb2.PipelineRequest(user_id="u", request_id=uuid.uuid4().hex)
    request.custom.name = "stopped"
    request.custom.input.Pack(StringValue(value="rain"))
    async with Worker(
        temporal,
        task_queue=QUEUE,
        plugins=[WorkerVersioning(None)],
        workflows=[LLMPipelineWorkflow, Waiting],
        activities=[admit, publish, forget, left_usage],
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        handle: WorkflowHandle[Any, pipeline_pb2.PipelineResult] = await temporal.start_workflow(
            names.PIPELINE_WORKFLOW_TYPE,
            internal_pb2.PipelineRun(pipeline=request),
            id=f"llmpipe-u-{request.request_id}",
            task_queue=QUEUE,
            result_type=pipeline_pb2.PipelineResult,
        )
        job = temporal.get_workflow_handle(f"{handle.id}/write")

        async def has_started() -> bool:
            with suppress(RPCError):
                return bool((await job.describe()).id)
            return False

        await until(has_started)
        await job.terminate()
        result = await handle.result()
    output = StringValue()
    result.value.Unpack(output)
    assert output.value == Terminated.reason
    await Replayer(
        workflows=[LLMPipelineWorkflow], data_converter=data_converter, workflow_runner=UnsandboxedWorkflowRunner()
    ).replay_workflow(await handle.fetch_history())
