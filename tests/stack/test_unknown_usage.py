"""A step that Temporal or an operator has ended ends as such, although nobody knows now what it has used."""

from contextlib import suppress

from google.protobuf.wrappers_pb2 import StringValue
from temporalio import activity
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from jobs import names
from jobs.errors import Terminated
from llm_pb import pipeline_pb2
from pipelines import Pipeline, StepFailed, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from tests.support.files import until
from tests.support.replays import PIPELINE_ACTIVITIES, WAITS, Job, replay, start_pipeline, worker

QUEUE = "unknown-usage"


@pipeline("stopped", StringValue, StringValue)
async def stopped(llm: Pipeline, text: StringValue) -> StringValue:
    """Return why a job has failed."""
    try:
        await llm.generate("write", model="docstrings", prompt=text.value)
    except StepFailed as error:
        return StringValue(value=error.reason)
    return text


@activity.defn(name=names.ACTIVITY_LEFT_USAGE)
async def left_usage(workflow_id: str) -> pipeline_pb2.PipelineResult:
    raise ApplicationError("scripted", non_retryable=True)


async def test_a_step_that_an_operator_has_ended_says_so_although_its_usage_cannot_be_asked_for(
    temporal: Client,
) -> None:
    """The gateway asks Temporal, which may be away for longer than the gateway asks."""
    async with worker(temporal, QUEUE, [LLMPipelineWorkflow, Job], [left_usage, *PIPELINE_ACTIVITIES]):
        handle = await start_pipeline(temporal, QUEUE, "stopped", StringValue(value=WAITS))
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
    await replay(handle, LLMPipelineWorkflow)
