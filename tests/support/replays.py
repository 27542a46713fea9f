"""Workflows that are asked all the time, and their replays. The parts around a pipeline are scripted."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import StringValue
from temporalio import activity, workflow
from temporalio.client import Client, WorkflowHandle, WorkflowHistory, WorkflowQueryFailedError
from temporalio.service import RPCError
from temporalio.worker import (
    Interceptor,
    Replayer,
    UnsandboxedWorkflowRunner,
    Worker,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)

from jobs import names
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from payload_converter import data_converter
from runtime.worker_versioning import WorkerVersioning
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.told import Telling

Handle = WorkflowHandle[Any, Any]
WAITS: Final = "wait"
"""The prompt of a scripted job that never ends."""


@asynccontextmanager
async def asked(handle: Handle, query: str) -> AsyncIterator[None]:
    """Ask a workflow all the time. A query may end a workflow task before the code gets the end of a local activity."""

    async def ask() -> None:
        while True:
            with suppress(RPCError, WorkflowQueryFailedError):
                await handle.query(query)

    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(ask()) for _ in range(3)]
        try:
            yield
        finally:
            for task in asking:
                task.cancel()


class Intercepting(Interceptor):
    """Has each workflow called through an interceptor of its own."""

    def __init__(self, inbound: type[WorkflowInboundInterceptor]) -> None:
        self._inbound = inbound

    def workflow_interceptor_class(
        self,
        input: WorkflowInterceptorClassInput,  # noqa: A002
    ) -> type[WorkflowInboundInterceptor]:
        """Return the interceptor."""
        return self._inbound


async def has(handle: Handle, *fields: Any) -> bool:
    """Return whether the history has an event with one of these fields."""
    return any(event.HasField(field) for event in (await handle.fetch_history()).events for field in fields)


async def replay(handle: Handle, workflow_class: type) -> None:
    """Replay a workflow. Raises what its worker would raise for it."""
    await replay_history(await handle.fetch_history(), workflow_class)


async def replay_history(history: WorkflowHistory, workflow_class: type) -> None:
    """Replay a history. Like replay()."""
    replayer = Replayer(
        workflows=[workflow_class], data_converter=data_converter, workflow_runner=UnsandboxedWorkflowRunner()
    )
    await replayer.replay_workflow(history)


def worker(
    temporal: Client, queue: str, workflows: list[type], activities: list[Any], interceptors: Sequence[Interceptor] = ()
) -> Worker:
    """Return a worker as that of a gateway."""
    return Worker(
        temporal,
        task_queue=queue,
        plugins=[WorkerVersioning(None)],
        workflows=workflows,
        activities=activities,
        interceptors=interceptors,
        workflow_runner=UnsandboxedWorkflowRunner(),
    )


def reader_of(temporal: Client) -> PipelineReader:
    """Return the reader of a gateway of its own."""
    telling = Telling(temporal)
    return PipelineReader(temporal, DeliveryReader(temporal, telling), telling)


async def start_pipeline(
    temporal: Client,
    queue: str,
    name: str,
    value: Message | None = None,
    options: internal_pb2.PipelineOptions | None = None,
) -> Handle:
    """Start a registered pipeline on a queue."""
    request = pipeline_pb2.PipelineRequest(user_id="u", request_id=uuid.uuid4().hex)
    request.custom.name = name
    request.custom.input.Pack(StringValue(value="rain") if value is None else value)
    return await temporal.start_workflow(
        names.PIPELINE_WORKFLOW_TYPE,
        internal_pb2.PipelineRun(pipeline=request, options=options),
        id=f"llmpipe-u-{request.request_id}",
        task_queue=queue,
        result_type=pipeline_pb2.PipelineResult,
    )


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


PIPELINE_ACTIVITIES: Final = [admit_step, admit_steps, publish, forget]
"""What the steps of a pipeline ask its gateway for."""


@workflow.defn(name=names.JOB_WORKFLOW_TYPE)
class Job:
    """A job that ends at once, or never."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest) -> llm_pb2.JobResult:
        await workflow.wait_condition(lambda: job.prompt != WAITS)
        return llm_pb2.JobResult(output="x", finish_reason=llm_pb2.FINISH_REASON_STOP)
