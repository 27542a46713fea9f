"""A pipeline whose gateway dies is replayed by another one, whatever order its local activities have ended in."""

import asyncio

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

from jobs import names
from llm_pb import internal_pb2, llm_pb2
from pipelines import Pipeline, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from tests.support.files import until
from tests.support.replays import PIPELINE_ACTIVITIES, Job, asked, has, replay, start_pipeline, worker

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


def ending_last(client: Client, last: str) -> Worker:
    local = LocalActivities(last)
    return worker(client, QUEUE, [LLMPipelineWorkflow], [local.publish, local.admit])


@pytest.mark.parametrize("last", [names.ACTIVITY_PUBLISH_PIPELINE, names.ACTIVITY_ADMIT_STEP])
async def test_a_query_while_local_activities_run_does_not_keep_a_pipeline_from_its_replay(
    temporal: Client, last: str
) -> None:
    """The first task of a gateway that takes a pipeline over answers those who have asked meanwhile, and ends early."""
    handle = await start_pipeline(temporal, QUEUE, "shouting")
    async with ending_last(temporal, names.ACTIVITY_ADMIT_STEP):
        await until(lambda: has(handle, "activity_task_scheduled_event_attributes"))
        await until(lambda: has(handle, "timer_fired_event_attributes"))
    async with Worker(temporal, task_queue=OTHER, activities=[shout]):
        await until(lambda: has(handle, "activity_task_completed_event_attributes"))
    asking = asyncio.create_task(handle.query(names.QUERY_GET_RECORD, result_type=internal_pb2.PipelineRecord))
    # Nothing shows that Temporal has taken it in.
    await asyncio.sleep(0.3)
    async with ending_last(temporal, last):
        await asking
        await until(lambda: has(handle, "start_child_workflow_execution_initiated_event_attributes"))
    await replay(handle, LLMPipelineWorkflow)
    await handle.terminate()


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


async def test_a_pipeline_that_is_asked_all_the_time_can_be_replayed(temporal: Client) -> None:
    """A query may end a workflow task before the code has got the result of a local activity."""
    async with worker(temporal, QUEUE, [LLMPipelineWorkflow, Job], [shout, *PIPELINE_ACTIVITIES]):
        handle = await start_pipeline(temporal, QUEUE, "crossing")
        async with asked(handle, names.QUERY_GET_RECORD):
            await handle.result()
    await replay(handle, LLMPipelineWorkflow)
