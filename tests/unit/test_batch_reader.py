"""The status of a batch whose workflow does not answer."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from llm_pb import batch_pb2, internal_pb2
from payload_converter import data_converter
from services.gateway.batches.reader import BatchReader
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.errors import ApiError

COUNTED = internal_pb2.BatchRecord(
    status=batch_pb2.BatchStatus(
        batch_id="llmbatch-u-1", state=batch_pb2.BATCH_STATE_RUNNING, counts={"total": 9, "succeeded": 4}
    )
)


class Workflow:
    """A workflow that answers until its present task fails, as Temporal tells by FAILED_PRECONDITION."""

    data_converter = data_converter

    def __init__(self) -> None:
        self.fails = False

    async def fetch_history_events(self, **_: Any) -> AsyncIterator[HistoryEvent]:
        for _number in range(3):
            yield HistoryEvent()
        yield HistoryEvent(event_type=EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED)

    def get_workflow_handle(self, *_: Any, **__: Any) -> "Workflow":
        return self

    async def query(self, *_: Any, **__: Any) -> internal_pb2.BatchRecord:
        if self.fails:
            raise RPCError("the task is in a failed state", RPCStatusCode.FAILED_PRECONDITION, b"")
        return COUNTED


def described(length: int, run: str = "a") -> WorkflowExecutionDescription:
    raw = DescribeWorkflowExecutionResponse()
    raw.workflow_execution_info.first_run_id = "a"

    async def memo_value(_: str, default: Any = None) -> Any:
        return default

    found = SimpleNamespace(
        id="llmbatch-u-1",
        run_id=run,
        history_length=length,
        status=WorkflowExecutionStatus.RUNNING,
        start_time=datetime(2026, 1, 1, tzinfo=UTC),
        memo_value=memo_value,
        raw_description=raw,
    )
    return cast("WorkflowExecutionDescription", found)


def reader_of(workflow: Workflow) -> BatchReader:
    return BatchReader(cast("Client", workflow), cast("DeliveryReader", None))


async def test_counts_never_go_back_while_a_task_fails_or_a_run_begins() -> None:
    workflow = Workflow()
    reader = reader_of(workflow)
    seen = (await reader.view_of(described(50))).record.status
    workflow.fails = True
    for description in (described(52), described(3, run="b")):
        status = (await reader.view_of(description)).record.status
        assert (status.state, status.counts) == (seen.state, seen.counts)


async def test_a_gateway_that_has_not_seen_the_counts_says_that_the_batch_does_not_answer() -> None:
    workflow = Workflow()
    workflow.fails = True
    for description in (described(52), described(3, run="b")):
        with pytest.raises(ApiError) as raised:
            await reader_of(workflow).view_of(description)
        assert raised.value.status.message == "the batch does not answer; call again"
    new = (await reader_of(workflow).view_of(described(3))).record.status
    assert new.state == batch_pb2.BATCH_STATE_VALIDATING
