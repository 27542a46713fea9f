"""A query does not bring a pipeline events for which no workflow task has started.

The SDK (temporalio 1.35) runs a workflow with such events, and a replay may find its commands in another order.
"""

import asyncio
import uuid
from datetime import timedelta
from typing import Any

from temporalio import activity, workflow
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetStickyTaskQueueRequest
from temporalio.client import Client, OutboundInterceptor, QueryWorkflowInput, WorkflowQueryFailedError
from temporalio.client import Interceptor as ClientInterceptor
from temporalio.service import RPCError
from temporalio.worker import (
    HandleQueryInput,
    Interceptor,
    Worker,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)

from jobs import names
from runtime.queries import EARLY, AskingAgain
from services.gateway.workflow_runner import ContainedRunner, prepared
from tests.support.replays import Handle, has, replay

NOOP = "Noop"
ROUNDS, AT_ONCE = 10, 6
TYPE = names.PIPELINE_WORKFLOW_TYPE


@activity.defn(name=NOOP)
async def noop() -> None:
    pass


@workflow.defn(name=TYPE)
class TwoSignals:
    """Makes its two commands in an order that depends on whether both signals come at once."""

    def __init__(self) -> None:
        self._come: set[str] = set()

    @workflow.run
    async def run(self) -> None:
        await asyncio.gather(self._after_first(), self._after_second())

    async def _after_first(self) -> None:
        await workflow.wait_condition(lambda: "first" in self._come)
        for _ in range(5):
            await asyncio.sleep(0)
        await workflow.sleep(0.01)

    async def _after_second(self) -> None:
        await workflow.wait_condition(lambda: "second" in self._come)
        await workflow.execute_activity(NOOP, start_to_close_timeout=timedelta(seconds=10))

    @workflow.signal
    def come(self, which: str) -> None:
        self._come.add(which)

    @workflow.query
    def has_come(self, which: str) -> bool:
        return which in self._come


class SecondMeanwhile(Interceptor):
    """Sends a workflow its second signal while it answers a query."""

    def __init__(self, temporal: Client) -> None:
        loop = asyncio.get_running_loop()

        class Answering(WorkflowInboundInterceptor):
            async def handle_query(self, input: HandleQueryInput) -> Any:  # noqa: A002
                handle = temporal.get_workflow_handle(workflow.info().workflow_id)
                asyncio.run_coroutine_threadsafe(handle.signal("come", "second"), loop).result(10)
                return await super().handle_query(input)

        self._answering = Answering

    def workflow_interceptor_class(
        self,
        input: WorkflowInterceptorClassInput,  # noqa: A002
    ) -> type[WorkflowInboundInterceptor] | None:
        """Return what answers queries."""
        return self._answering


def gateway(temporal: Client, queue: str, *interceptors: Interceptor) -> Worker:
    """Return a worker that runs workflows as that of a gateway does, but few at a time."""
    runner = ContainedRunner()
    worker = Worker(
        temporal,
        task_queue=queue,
        workflows=[TwoSignals],
        activities=[noop],
        interceptors=interceptors,
        workflow_runner=runner,
        max_concurrent_workflow_tasks=2,
    )
    return prepared(worker, runner)


class Noting(ClientInterceptor):
    """Counts the queries that were refused."""

    def __init__(self) -> None:
        self.refused = 0

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:  # noqa: A002
        """Return what notes refusals."""
        noting = self

        class Outbound(OutboundInterceptor):
            async def query_workflow(self, input: QueryWorkflowInput) -> Any:  # noqa: A002
                try:
                    return await super().query_workflow(input)
                except WorkflowQueryFailedError as error:
                    noting.refused += error.message == EARLY
                    raise

        return Outbound(next)


def asking(temporal: Client, noting: Noting) -> Client:
    """Return a client that asks as those of the services do."""
    return Client(temporal.service_client, data_converter=temporal.data_converter, interceptors=[AskingAgain(), noting])


async def ask_before_its_task(handle: Handle) -> None:
    """Ask a workflow that no worker has, and send the first signal."""
    question = asyncio.create_task(handle.query("has_come", "first"))
    # Nothing shows that Temporal has taken it in.
    await asyncio.sleep(0.3)
    await handle.signal("come", "first")
    try:
        assert await question
    except RPCError:
        # Temporal knows of no worker that might answer.
        await handle.signal("come", "second")


async def test_a_query_brings_no_events_of_a_task_that_has_not_started(temporal: Client) -> None:
    noting = Noting()
    client = asking(temporal, noting)
    for _ in range(ROUNDS):
        queue = f"queried-{uuid.uuid4().hex}"
        handles: list[Handle] = []
        async with gateway(temporal, queue):
            for number in range(AT_ONCE):
                handles.append(await client.start_workflow(TYPE, id=f"{queue}-{number}", task_queue=queue))
            for handle in handles:
                assert not await handle.query("has_come", "first")
        for handle in handles:
            execution = WorkflowExecution(workflow_id=handle.id)
            await temporal.workflow_service.reset_sticky_task_queue(
                ResetStickyTaskQueueRequest(namespace=temporal.namespace, execution=execution)
            )
        questions = [asyncio.create_task(ask_before_its_task(handle)) for handle in handles]
        await asyncio.sleep(0.6)
        async with gateway(temporal, queue, SecondMeanwhile(temporal)):
            await asyncio.gather(*questions)
            for handle in handles:
                await handle.result()
        for handle in handles:
            assert not await has(handle, "workflow_task_failed_event_attributes")
            await replay(handle, TwoSignals)
        if noting.refused:
            return
    raise AssertionError("no query has come before a workflow task")


async def test_a_workflow_that_was_terminated_before_a_task_answers(temporal: Client) -> None:
    noting = Noting()
    queue = f"queried-{uuid.uuid4().hex}"
    handle: Handle = await asking(temporal, noting).start_workflow(
        names.PIPELINE_WORKFLOW_TYPE, id=queue, task_queue=queue
    )
    async with gateway(temporal, queue):
        await handle.query("has_come", "first")
    await handle.signal("come", "first")
    await handle.terminate()
    async with gateway(temporal, queue):
        for _ in range(3):
            assert not await handle.query("has_come", "first")
    assert noting.refused
