"""Pipelines that gateways do not have: each waits for one that has it, and ends when there is none."""

import uuid
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BoolValue
from temporalio import activity
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.worker import HandleQueryInput, Interceptor, WorkflowInboundInterceptor, WorkflowInterceptorClassInput

import pipelines.code
from jobs import names
from jobs.pipelines import UNKNOWN_PIPELINE
from llm_pb import llm_pb2
from pipelines import Pipeline, pipeline
from pipelines.workflow import LLMPipelineWorkflow
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.told import Telling
from tests.support.files import until
from tests.support.replays import PIPELINE_ACTIVITIES, Job, has, reader_of, replay, start_pipeline, worker


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


class FailingQueries(Interceptor):
    """Lets a number of queries fail, as at gateways that do not have the pipeline."""

    def __init__(self, number: int) -> None:
        left = [number]

        class Answering(WorkflowInboundInterceptor):
            async def handle_query(self, input: HandleQueryInput) -> Any:  # noqa: A002
                left[0] -= 1
                if left[0] >= 0:
                    raise RuntimeError("another gateway has to run it")
                return await super().handle_query(input)

        self._answering = Answering

    def workflow_interceptor_class(
        self,
        input: WorkflowInterceptorClassInput,  # noqa: A002
    ) -> type[WorkflowInboundInterceptor] | None:
        """Return what answers."""
        return self._answering


@pipeline("two-steps", BoolValue, BoolValue)
async def two_steps(llm: Pipeline, _: BoolValue) -> BoolValue:
    await llm.generate("first", model="docstrings", prompt="x")
    await llm.generate("second", model="docstrings", prompt="x")
    return BoolValue(value=True)


async def test_an_ended_pipeline_is_read_at_a_gateway_that_has_it(temporal: Client) -> None:
    """Temporal gives the query to any gateway. Where one did not have the pipeline, it was read without steps."""
    queue = f"unknown-{uuid.uuid4().hex}"
    handle = await start_pipeline(temporal, queue, "two-steps", BoolValue())
    workflows = [LLMPipelineWorkflow, Job]
    async with worker(temporal, queue, workflows, PIPELINE_ACTIVITIES):
        await handle.result()
    async with worker(temporal, queue, workflows, PIPELINE_ACTIVITIES, [FailingQueries(4)]):
        look = await reader_of(temporal).look(await handle.describe())
    assert look.answered
    assert [node.step.path for node in look.record.nodes] == ["first", "second"]
    async with worker(temporal, queue, workflows, PIPELINE_ACTIVITIES, [FailingQueries(4)]):
        standing = await DeliveryReader(temporal, Telling(temporal)).standing(handle.id, await handle.describe())
    assert not standing.open


@pytest.mark.parametrize("by_signal", [True, False])
async def test_a_pipeline_that_waits_for_a_gateway_can_be_cancelled(temporal: Client, *, by_signal: bool) -> None:
    @activity.defn(name=names.ACTIVITY_REQUEST_CANCEL)
    async def request_cancel() -> None:
        await temporal.get_workflow_handle(activity.info().workflow_id or "").cancel()

    queue = f"unknown-{uuid.uuid4().hex}"
    handle = await start_pipeline(temporal, queue, "nobody-has-it", BoolValue())
    async with worker(temporal, queue, [LLMPipelineWorkflow], [request_cancel, *PIPELINE_ACTIVITIES]):
        await until(lambda: has(handle, "workflow_task_failed_event_attributes"))
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
