"""Pipelines that gateways do not have: each waits for one that has it, and ends when there is none."""

import uuid
from datetime import timedelta
from typing import Any, Final

import pytest
from google.protobuf.wrappers_pb2 import BoolValue
from google.rpc import code_pb2
from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import HandleQueryInput, WorkflowInboundInterceptor

import pipelines.code
from jobs import names
from jobs.pipelines import TOTAL_TIMEOUT, UNKNOWN_PIPELINE
from llm_pb import internal_pb2, llm_pb2
from pipelines import Pipeline, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from services.gateway.delivery_reader import DeliveryReader, Standing
from services.gateway.errors import ApiError
from services.gateway.told import Telling
from tests.support.files import until
from tests.support.replays import (
    PIPELINE_ACTIVITIES,
    Handle,
    Intercepting,
    Job,
    has,
    reader_of,
    replay,
    start_pipeline,
    worker,
)
from workflows.llm_delivery import LLMDeliveryWorkflow


async def test_a_pipeline_that_no_gateway_has_ends(temporal: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed open for ever: the time since its start began again with each task."""
    monkeypatch.setattr(pipelines.code, "_ROLL_OUT", timedelta(seconds=5))
    queue = f"unknown-{uuid.uuid4().hex}"
    handle = await start_pipeline(temporal, queue, "nobody-has-it", BoolValue())
    async with worker(temporal, queue, [LLMPipelineWorkflow], PIPELINE_ACTIVITIES):
        with pytest.raises(WorkflowFailureError) as failed:
            await handle.result()
        assert isinstance(failed.value.cause, ApplicationError)
        assert failed.value.cause.type == UNKNOWN_PIPELINE
        assert await has(handle, "workflow_task_failed_event_attributes")
    # Another gateway, which does not have it either.
    monkeypatch.undo()
    async with worker(temporal, queue, [LLMPipelineWorkflow], PIPELINE_ACTIVITIES):
        look = await reader_of(temporal).look(await handle.describe())
    assert look.answered
    assert look.record.status.state == llm_pb2.JOB_STATE_FAILED
    await replay(handle, LLMPipelineWorkflow)


async def test_a_pipeline_that_waits_for_a_gateway_ends_with_its_time(temporal: Client) -> None:
    queue = f"unknown-{uuid.uuid4().hex}"
    options = internal_pb2.PipelineOptions()
    # A gateway's clock. Only the time between the two counts.
    options.create_time.FromSeconds(10)
    options.expire_time.FromSeconds(15)
    handle = await start_pipeline(temporal, queue, "nobody-has-it", BoolValue(), options)
    async with worker(temporal, queue, [LLMPipelineWorkflow], PIPELINE_ACTIVITIES):
        with pytest.raises(WorkflowFailureError) as failed:
            await handle.result()
        look = await reader_of(temporal).look(await handle.describe())
    assert isinstance(failed.value.cause, ApplicationError)
    assert failed.value.cause.type == TOTAL_TIMEOUT
    assert look.record.status.state == llm_pb2.JOB_STATE_TIMED_OUT
    await replay(handle, LLMPipelineWorkflow)


def waiting_delivery() -> internal_pb2.JobOptions:
    """Return how a pipeline notifies a notifier that does not run: it holds for some seconds, and closes."""
    delivery = internal_pb2.JobOptions(notify_task_queue=f"nobody-{uuid.uuid4().hex}")
    delivery.notify_hold.FromTimedelta(timedelta(seconds=8))
    delivery.notify_retry.within.FromTimedelta(timedelta(hours=1))
    delivery.notify_retry.initial_interval.FromTimedelta(timedelta(seconds=1))
    delivery.notify_retry.maximum_interval.FromTimedelta(timedelta(seconds=1))
    delivery.notify_retry.backoff_coefficient = 1
    delivery.notify_retry.maximum_attempts = 100
    return delivery


def install(name: str) -> None:
    """Register a pipeline as late as the test says."""

    @pipeline(name, BoolValue, BoolValue)
    async def program(llm: Pipeline, _: BoolValue) -> BoolValue:
        await llm.generate("first", model="docstrings", prompt="x")
        return BoolValue(value=True)


@pytest.mark.parametrize("notifies", [True, False])
async def test_a_pipeline_that_was_given_up_ends_where_it_is_installed_later(
    temporal: Client, monkeypatch: pytest.MonkeyPatch, *, notifies: bool
) -> None:
    """It could not be replayed there: while it notified it stayed open for ever, and later nobody could read it."""
    monkeypatch.setattr(pipelines.code, "_ROLL_OUT", timedelta(seconds=3))
    queue, name = f"unknown-{uuid.uuid4().hex}", f"late-{uuid.uuid4().hex}"
    options = internal_pb2.PipelineOptions(delivery=waiting_delivery() if notifies else None)
    handle = await start_pipeline(temporal, queue, name, BoolValue(), options)
    async with worker(temporal, queue, WORKFLOWS, PIPELINE_ACTIVITIES):
        if notifies:
            await until(lambda: has(handle, "activity_task_scheduled_event_attributes"))
            assert (await handle.describe()).status == WorkflowExecutionStatus.RUNNING
        else:
            with pytest.raises(WorkflowFailureError):
                await handle.result()
    install(name)
    async with worker(temporal, queue, WORKFLOWS, PIPELINE_ACTIVITIES):
        with pytest.raises(WorkflowFailureError) as failed:
            await handle.result()
        look = await reader_of(temporal).look(await handle.describe())
        await standing_of(temporal, handle)
    assert isinstance(failed.value.cause, ApplicationError)
    assert failed.value.cause.type == UNKNOWN_PIPELINE
    assert look.answered
    await replay(handle, LLMPipelineWorkflow)


class FailingQueries(Intercepting):
    """Lets a number of queries fail, as at gateways that do not have the pipeline."""

    def __init__(self, number: int) -> None:
        left = [number]

        class Answering(WorkflowInboundInterceptor):
            async def handle_query(self, input: HandleQueryInput) -> Any:  # noqa: A002
                left[0] -= 1
                if left[0] >= 0:
                    raise RuntimeError("another gateway has to run it")
                return await super().handle_query(input)

        super().__init__(Answering)


@pipeline("two-steps", BoolValue, BoolValue)
async def two_steps(llm: Pipeline, _: BoolValue) -> BoolValue:
    await llm.generate("first", model="docstrings", prompt="x")
    await llm.generate("second", model="docstrings", prompt="x")
    return BoolValue(value=True)


WORKFLOWS: Final = [LLMPipelineWorkflow, LLMDeliveryWorkflow, Job]


async def ended_pipeline(temporal: Client, queue: str) -> Handle:
    """Run a pipeline of two steps to its end, and let its gateway go."""
    handle = await start_pipeline(temporal, queue, "two-steps", BoolValue())
    async with worker(temporal, queue, WORKFLOWS, PIPELINE_ACTIVITIES):
        await handle.result()
    return handle


async def standing_of(temporal: Client, handle: Handle) -> Standing:
    return await DeliveryReader(temporal, Telling(temporal)).standing(handle.id, await handle.describe())


async def assert_deliveries_are_unavailable(temporal: Client, handle: Handle) -> None:
    with pytest.raises(ApiError) as refused:
        await standing_of(temporal, handle)
    assert refused.value.status.code == code_pb2.UNAVAILABLE


async def test_an_ended_pipeline_is_read_at_a_gateway_that_has_it(temporal: Client) -> None:
    """Temporal gives the query to any gateway. Where one did not have the pipeline, it was read without steps."""
    queue = f"unknown-{uuid.uuid4().hex}"
    handle = await ended_pipeline(temporal, queue)
    async with worker(temporal, queue, WORKFLOWS, PIPELINE_ACTIVITIES, [FailingQueries(4)]):
        look = await reader_of(temporal).look(await handle.describe())
    assert look.answered
    assert [node.step.path for node in look.record.nodes] == ["first", "second"]
    async with worker(temporal, queue, WORKFLOWS, PIPELINE_ACTIVITIES, [FailingQueries(4)]):
        standing = await standing_of(temporal, handle)
    assert not standing.open


async def test_deliveries_of_an_ended_pipeline_that_no_gateway_has_are_unavailable(temporal: Client) -> None:
    """They were NOT_FOUND, as if the pipeline were not there."""
    queue = f"unknown-{uuid.uuid4().hex}"
    handle = await ended_pipeline(temporal, queue)
    async with worker(temporal, queue, WORKFLOWS, PIPELINE_ACTIVITIES, [FailingQueries(99)]):
        await assert_deliveries_are_unavailable(temporal, handle)


async def test_deliveries_of_an_ended_pipeline_are_unavailable_while_no_gateway_runs(temporal: Client) -> None:
    queue = f"unknown-{uuid.uuid4().hex}"
    handle = await ended_pipeline(temporal, queue)

    async def knows_of_no_gateway() -> bool:
        try:
            await handle.query(names.QUERY_GET_DELIVERIES, rpc_timeout=timedelta(seconds=2))
        except RPCError as error:
            return error.status == RPCStatusCode.FAILED_PRECONDITION
        return False

    await until(knows_of_no_gateway)
    await assert_deliveries_are_unavailable(temporal, handle)


@pytest.mark.parametrize("by_signal", [True, False])
async def test_a_pipeline_that_waits_for_a_gateway_can_be_cancelled(temporal: Client, *, by_signal: bool) -> None:
    @activity.defn(name=names.ACTIVITY_REQUEST_CANCEL)
    async def request_cancel() -> None:
        await temporal.get_workflow_handle(activity.info().workflow_id or "").cancel()

    queue = f"unknown-{uuid.uuid4().hex}"
    handle = await start_pipeline(temporal, queue, "nobody-has-it", BoolValue())
    async with worker(temporal, queue, [LLMPipelineWorkflow], [request_cancel, *PIPELINE_ACTIVITIES]):
        await until(lambda: has(handle, "workflow_task_failed_event_attributes"))
        waiting = await reader_of(temporal).look(await handle.describe())
        assert waiting.record.status.state == llm_pb2.JOB_STATE_RUNNING
        assert waiting.record.status.name == "nobody-has-it"
        if by_signal:
            await handle.signal(names.SIGNAL_CANCEL, llm_pb2.CancelRequest(reason="enough"))
        else:
            await handle.cancel()
        with pytest.raises(WorkflowFailureError) as failed:
            await handle.result()
        look = await reader_of(temporal).look(await handle.describe())
    assert isinstance(failed.value.cause, CancelledError)
    assert look.record.status.state == llm_pb2.JOB_STATE_CANCELLED
    assert ("enough" in look.record.status.root.error.message) == by_signal
    await replay(handle, LLMPipelineWorkflow)
