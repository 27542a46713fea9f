"""Reading a pipeline brings no cold gateway events for which no workflow task has started.

A query does. The SDK (temporalio 1.35) runs the workflow with them. A replay may find its commands in another order.
"""

import asyncio
import uuid
from datetime import timedelta
from typing import Any

from google.protobuf.wrappers_pb2 import BoolValue
from temporalio import activity, workflow
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetStickyTaskQueueRequest
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import (
    HandleQueryInput,
    HandleUpdateInput,
    Interceptor,
    Worker,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)

from pipelines import Pipeline, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from runtime.worker_versioning import WorkerVersioning
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.workflow_runner import ContainedRunner
from tests.support.replays import PIPELINE_ACTIVITIES, Handle, has, replay, start_pipeline

NOOP, COME = "Noop", "come"
PIPELINES = 6


@activity.defn(name=NOOP)
async def noop() -> None:
    pass


@pipeline("two-signals", BoolValue, BoolValue)
async def two_signals(llm: Pipeline, _: BoolValue) -> BoolValue:
    """Make two commands in an order that depends on whether both signals come at once."""
    come: set[str] = set()

    async def after_first() -> None:
        await workflow.wait_condition(lambda: "first" in come)
        for _ in range(5):
            await asyncio.sleep(0)
        await workflow.sleep(0.01)

    async def after_second() -> None:
        await workflow.wait_condition(lambda: "second" in come)
        await workflow.execute_activity(NOOP, start_to_close_timeout=timedelta(seconds=10))

    def note(which: str) -> None:
        come.add(which)

    workflow.set_signal_handler(COME, note)
    await asyncio.gather(after_first(), after_second())
    return BoolValue(value=True)


class SecondMeanwhile(Interceptor):
    """Sends a workflow its second signal while it answers."""

    def __init__(self, temporal: Client) -> None:
        loop = asyncio.get_running_loop()

        class Answering(WorkflowInboundInterceptor):
            def _second(self) -> None:
                handle = temporal.get_workflow_handle(workflow.info().workflow_id)
                asyncio.run_coroutine_threadsafe(handle.signal(COME, "second"), loop).result(10)

            async def handle_query(self, input: HandleQueryInput) -> Any:  # noqa: A002
                self._second()
                return await super().handle_query(input)

            def handle_update_validator(self, input: HandleUpdateInput) -> None:  # noqa: A002
                self._second()
                super().handle_update_validator(input)

        self._answering = Answering

    def workflow_interceptor_class(
        self,
        input: WorkflowInterceptorClassInput,  # noqa: A002
    ) -> type[WorkflowInboundInterceptor] | None:
        """Return what answers."""
        return self._answering


def gateway(temporal: Client, queue: str, *interceptors: Interceptor) -> Worker:
    """Return a worker that runs pipelines as that of a gateway does, but few at a time."""
    return Worker(
        temporal,
        task_queue=queue,
        plugins=[WorkerVersioning(None)],
        workflows=[LLMPipelineWorkflow],
        activities=[noop, *PIPELINE_ACTIVITIES],
        interceptors=interceptors,
        workflow_runner=ContainedRunner(),
        max_concurrent_workflow_tasks=2,
    )


async def read_before_its_task(reader: PipelineReader, handle: Handle) -> None:
    """Read a pipeline that no gateway has, and send the first signal."""
    reading = asyncio.create_task(reader.record_of(await handle.describe()))
    # Nothing shows that Temporal has taken it in.
    await asyncio.sleep(0.3)
    await handle.signal(COME, "first")
    try:
        assert (await reading).status.pipeline_id == handle.id
    except RPCError:
        # Temporal knows of no worker that might answer.
        await handle.signal(COME, "second")


async def test_a_pipeline_that_is_read_before_its_task_can_be_replayed(temporal: Client) -> None:
    queue = f"told-{uuid.uuid4().hex}"
    reader = PipelineReader(temporal, DeliveryReader(temporal))
    handles = [await start_pipeline(temporal, queue, "two-signals", BoolValue()) for _ in range(PIPELINES)]
    async with gateway(temporal, queue):
        for handle in handles:
            await reader.record_of(await handle.describe())
    for handle in handles:
        execution = WorkflowExecution(workflow_id=handle.id)
        await temporal.workflow_service.reset_sticky_task_queue(
            ResetStickyTaskQueueRequest(namespace=temporal.namespace, execution=execution)
        )
    readings = [asyncio.create_task(read_before_its_task(reader, handle)) for handle in handles]
    await asyncio.sleep(0.6)
    async with gateway(temporal, queue, SecondMeanwhile(temporal)):
        await asyncio.gather(*readings)
        for handle in handles:
            await handle.result()
    for handle in handles:
        assert not await has(handle, "workflow_task_failed_event_attributes")
        await replay(handle, LLMPipelineWorkflow)
