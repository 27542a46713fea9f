"""Reading a pipeline brings no cold gateway events for which no workflow task has started.

A query does. The SDK (temporalio 1.35) runs the workflow with them. A replay may find its commands in another order.
"""

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BoolValue, Int32Value, StringValue
from google.rpc import code_pb2
from temporalio import activity, workflow
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import ResetStickyTaskQueueRequest
from temporalio.client import Client, WorkflowFailureError, WorkflowHistory
from temporalio.service import RPCError
from temporalio.worker import (
    HandleQueryInput,
    HandleUpdateInput,
    Interceptor,
    Worker,
    WorkflowInboundInterceptor,
)

from jobs.pipelines import MAX_QUESTION_BYTES
from pipelines import Pipeline, StepFailed, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from runtime.worker_versioning import WorkerVersioning
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.errors import ApiError
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.told import Telling
from services.gateway.workflow_runner import ContainedRunner
from tests.support.files import until
from tests.support.replays import (
    PIPELINE_ACTIVITIES,
    Handle,
    Intercepting,
    Job,
    has,
    reader_of,
    replay,
    replay_history,
    start_pipeline,
)

NOOP, HELD, COME = "Noop", "Held", "come"
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


@pipeline("undone", BoolValue, BoolValue)
async def undone(llm: Pipeline, _: BoolValue) -> BoolValue:
    async def undo() -> None:
        await llm.generate("undo", model="docstrings", prompt="x")

    llm.compensate(undo)
    await llm.step("held", HELD, "", task_queue=workflow.info().task_queue)
    raise ValueError("scripted")


@pipeline("many-questions", Int32Value, BoolValue)
async def many_questions(llm: Pipeline, count: Int32Value) -> BoolValue:
    async with asyncio.TaskGroup() as tasks:
        for number in range(count.value):
            tasks.create_task(llm.approve(f"questions/{number}", "?" * MAX_QUESTION_BYTES))
    return BoolValue(value=True)


@pipeline("leaving-by-exit", BoolValue, BoolValue)
async def leaving_by_exit(llm: Pipeline, _: BoolValue) -> BoolValue:
    """Call sys.exit() in a task of its own, so that the workflow task fails."""

    async def leave() -> None:
        raise SystemExit(1)

    await asyncio.create_task(leave())
    return BoolValue(value=True)


class SecondMeanwhile(Intercepting):
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

        super().__init__(Answering)


def gateway(temporal: Client, queue: str, *interceptors: Interceptor, activities: Sequence[Any] = ()) -> Worker:
    """Return a worker that runs pipelines as that of a gateway does, but few at a time."""
    return Worker(
        temporal,
        task_queue=queue,
        plugins=[WorkerVersioning(None)],
        workflows=[LLMPipelineWorkflow, Job],
        activities=[noop, *activities, *PIPELINE_ACTIVITIES],
        interceptors=interceptors,
        workflow_runner=ContainedRunner(),
        max_concurrent_workflow_tasks=2,
    )


@pipeline("large-end", Int32Value, StringValue)
async def large_end(llm: Pipeline, count: Int32Value) -> StringValue:
    """Ask so many questions that nobody answers, and return a large result."""

    async def ask(number: int) -> None:
        with suppress(StepFailed):
            await llm.approve(f"asks/{number}", "q" * MAX_QUESTION_BYTES, timeout=timedelta(seconds=1))

    await asyncio.gather(*(ask(number) for number in range(count.value)))
    return StringValue(value="x" * (1024 * 1024 - 100))


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
    reader = reader_of(temporal)
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


async def test_an_open_pipeline_whose_task_fails_is_there(temporal: Client) -> None:
    """Who asks for its deliveries does not hear that it does not exist."""
    queue = f"told-{uuid.uuid4().hex}"
    handle = await start_pipeline(temporal, queue, "leaving-by-exit", BoolValue())

    async def fails_again() -> bool:
        # Temporal refuses nothing before.
        return (await handle.describe()).raw_description.pending_workflow_task.attempt > 2

    async with gateway(temporal, queue):
        await until(fails_again)
        with pytest.raises(ApiError) as refused:
            await DeliveryReader(temporal, Telling(temporal)).standing(handle.id, await handle.describe())
        assert refused.value.status.code == code_pb2.UNAVAILABLE
        await handle.terminate()


async def is_idle(handle: Handle) -> bool:
    """Return whether a pause has ended and nothing has followed."""
    events = (await handle.fetch_history()).events
    return events[-1].HasField("workflow_task_completed_event_attributes") and any(
        event.HasField("timer_fired_event_attributes") for event in events[-4:]
    )


async def test_reading_a_pipeline_adds_nothing_to_its_history(temporal: Client) -> None:
    queue = f"told-{uuid.uuid4().hex}"
    reader = reader_of(temporal)
    handle = await start_pipeline(temporal, queue, "two-signals", BoolValue())
    async with gateway(temporal, queue):
        await until(lambda: is_idle(handle))
        before = (await handle.describe()).history_length
        for _ in range(20):
            assert (await reader.look(await handle.describe())).answered
        assert (await handle.describe()).history_length == before
        for signal in ("first", "second"):
            await handle.signal(COME, signal)
        await handle.result()
    await replay(handle, LLMPipelineWorkflow)


async def test_many_gateways_may_read_a_large_pipeline_at_once(temporal: Client) -> None:
    """The answers of a workflow task are one message. Temporal terminates a workflow whose message is over 4 MB."""
    queue, steps = f"told-{uuid.uuid4().hex}", 900
    handle = await start_pipeline(temporal, queue, "many-questions", Int32Value(value=steps))
    async with gateway(temporal, queue):

        async def asks_all() -> bool:
            record = await reader_of(temporal).record_of(await handle.describe())
            return record.status.root.counts.needs_answer == steps

        await until(asks_all)
        readers = [reader_of(temporal) for _ in range(10)]
        for _ in range(3):
            description = await handle.describe()
            looks = await asyncio.gather(*(reader.look(description) for reader in readers))
            for look in looks:
                assert look.answered
                assert look.record.ByteSize() > 900_000
                assert [node.number for node in look.record.nodes] == [*range(len(look.record.nodes))]
                assert look.record.status.root.counts.total == steps
        assert len({look.record.SerializeToString(deterministic=True) for look in looks}) == 1
        await handle.cancel()
        with suppress(WorkflowFailureError):
            await handle.result()
    assert not await has(
        handle, "workflow_task_failed_event_attributes", "workflow_execution_terminated_event_attributes"
    )
    await replay(handle, LLMPipelineWorkflow)


async def test_a_pipeline_that_has_ended_with_a_large_tree_and_a_large_result_has_both(temporal: Client) -> None:
    """One answer to a query has no room for both: it was read without steps."""
    queue, steps = f"told-{uuid.uuid4().hex}", 950
    handle = await start_pipeline(temporal, queue, "large-end", Int32Value(value=steps))
    async with gateway(temporal, queue):
        result = await handle.result()
        look = await reader_of(temporal).look(await handle.describe())
    assert look.answered
    assert len(look.record.nodes) > steps
    assert look.record.result == result
    assert look.record.ByteSize() > 2 * 1024 * 1024


async def test_the_end_of_a_pause_may_come_with_what_came_later(temporal: Client) -> None:
    """A read makes a workflow task, and an event that comes meanwhile belongs to it. A replay takes it for one with the
    task before, if that has made no command, nor the one before that."""
    go_on = asyncio.Event()

    @activity.defn(name=HELD)
    async def held(*_: Any) -> None:
        await go_on.wait()

    queue = f"told-{uuid.uuid4().hex}"
    handle = await start_pipeline(temporal, queue, "undone", BoolValue())
    async with gateway(temporal, queue, activities=[held]):
        await until(lambda: is_idle(handle))
        go_on.set()
        with suppress(WorkflowFailureError):
            await handle.result()
    events = (await handle.fetch_history()).events
    ended = next(
        place for place, event in enumerate(events) if event.HasField("activity_task_started_event_attributes")
    )
    fired = next(place for place, event in enumerate(events) if event.HasField("timer_fired_event_attributes"))
    # What has made the pause end, the end, and then the task before it.
    task, end = [*range(fired + 1, fired + 4)], [ended, ended + 1]
    assert task[-1] + 1 == ended
    order = [*range(fired), *task, fired, *task, ended + 2, *end, *range(ended + 3, len(events))]
    await replay_history(WorkflowHistory(handle.id, in_order(events, order)), LLMPipelineWorkflow)


def in_order(events: Sequence[HistoryEvent], order: Sequence[int]) -> list[HistoryEvent]:
    """Return copies of events by their places, with the ids and the references that they have then."""
    places: dict[int, int] = {}
    found = []
    for number, place in enumerate(order, 1):
        event = HistoryEvent.FromString(events[place].SerializeToString())
        places[event.event_id] = number
        event.event_id = number
        attributes = getattr(event, str(event.WhichOneof("attributes")))
        for field in attributes.DESCRIPTOR.fields:
            if field.name.endswith("_event_id") and getattr(attributes, field.name):
                setattr(attributes, field.name, places[getattr(attributes, field.name)])
        found.append(event)
    return found
