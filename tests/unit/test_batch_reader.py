"""The status of a batch whose workflow does not answer."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio.api.enums.v1 import EventType, PendingActivityState
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
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

    def __init__(self, record: internal_pb2.BatchRecord = COUNTED) -> None:
        self.fails = False
        self.record = record

    async def fetch_history_events(self, **_: Any) -> AsyncIterator[HistoryEvent]:
        for _number in range(3):
            yield HistoryEvent()
        yield HistoryEvent(event_type=EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED)

    def get_workflow_handle(self, *_: Any, **__: Any) -> "Workflow":
        return self

    async def query(self, *_: Any, **__: Any) -> internal_pb2.BatchRecord:
        if self.fails:
            raise RPCError("the task is in a failed state", RPCStatusCode.FAILED_PRECONDITION, b"")
        return self.record


def described(
    length: int, run: str = "a", pending: Sequence[PendingActivityInfo] = (), first_run: str = "a"
) -> WorkflowExecutionDescription:
    raw = DescribeWorkflowExecutionResponse(pending_activities=pending)
    raw.workflow_execution_info.first_run_id = first_run

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


async def test_a_batch_that_runs_again_has_not_the_counts_of_the_run_before() -> None:
    workflow = Workflow()
    reader = reader_of(workflow)
    await reader.view_of(described(50))
    workflow.fails = True
    with pytest.raises(ApiError, match="does not answer"):
        await reader.view_of(described(52, run="b", first_run="b"))


async def test_a_gateway_that_has_not_seen_the_counts_says_that_the_batch_does_not_answer() -> None:
    workflow = Workflow()
    workflow.fails = True
    for description in (described(52), described(3, run="b")):
        with pytest.raises(ApiError) as raised:
            await reader_of(workflow).view_of(description)
        assert raised.value.status.message == "the batch does not answer; call again"
    new = (await reader_of(workflow).view_of(described(3))).record.status
    assert new.state == batch_pb2.BATCH_STATE_VALIDATING


def has_done(items: int, running: int = 0) -> internal_pb2.ChunkResult:
    """Return what a chunk says that has done its first items, each with ten tokens."""
    result = internal_pb2.ChunkResult(done=(2**items - 1).to_bytes(2, "little"))
    result.counts.succeeded, result.counts.running = items, running
    result.usage.output_tokens = 10 * items
    return result


async def activity_of(chunk: int, beat: internal_pb2.ChunkResult | None) -> PendingActivityInfo:
    info = PendingActivityInfo(
        activity_id=f"chunk-{chunk}-1", state=PendingActivityState.PENDING_ACTIVITY_STATE_STARTED
    )
    info.activity_type.name = names.ACTIVITY_RUN_BATCH_CHUNK
    if beat is not None:
        info.heartbeat_details.payloads.extend(await data_converter.encode([beat]))
    return info


@pytest.mark.parametrize(
    ("beat", "expected"),
    [
        # It waits for a lease: no activity runs.
        ("none", (5, 0)),
        # A worker has it, or not yet, and says nothing.
        (None, (5, 0)),
        # The heartbeat is the earlier activity's, of a description that is older than the answer of the workflow.
        (has_done(3, running=2), (5, 2)),
        (has_done(7, running=2), (7, 2)),
    ],
)
async def test_what_a_chunk_has_done_stays_while_it_waits_for_its_next_activity(
    beat: internal_pb2.ChunkResult | str | None, expected: tuple[int, int]
) -> None:
    record = internal_pb2.BatchRecord()
    record.CopyFrom(COUNTED)
    record.begun_chunks.add(chunk=2, result=has_done(5, running=1))
    pending = [] if isinstance(beat, str) else [await activity_of(2, beat)]
    view = await reader_of(Workflow(record)).view_of(described(50, pending=pending))
    done, runs = expected
    counts = view.record.status.counts
    assert (counts.total, counts.succeeded, counts.running) == (9, 4 + done, runs)
    assert view.record.status.usage.output_tokens == 10 * done
    # StreamBatchResults reads from here.
    assert [(chunk.ended.chunk, chunk.ended.result.counts.succeeded) for chunk in view.pending] == [(2, done)]


async def test_a_chunk_that_has_ended_since_the_description_counts_once() -> None:
    """Whether its end is in the answer of the workflow, or in a manifest by now."""
    record = internal_pb2.BatchRecord()
    record.CopyFrom(COUNTED)
    record.progress.recent.add(chunk=1)
    record.written_chunks.append(0)
    pending = [await activity_of(chunk, has_done(3)) for chunk in range(3)]
    view = await reader_of(Workflow(record)).view_of(described(50, pending=pending))
    assert view.record.status.counts.succeeded == 4 + 3
    assert [chunk.ended.chunk for chunk in view.pending] == [2]
