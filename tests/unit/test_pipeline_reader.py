"""What a gateway returns of a pipeline whose workflow does not answer."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.pipelines import new_status
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from payload_converter import data_converter
from services.gateway import told
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.errors import ApiError
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.told import Telling

ID = "llmpipe-u-1"


def record_of(version: int) -> internal_pb2.PipelineRecord:
    """Return the record of a pipeline with as many steps as its version."""
    record = internal_pb2.PipelineRecord(version=version)
    record.status.pipeline_id, record.status.state = ID, llm_pb2.JOB_STATE_RUNNING
    record.status.root.counts.total = version
    for number in range(version):
        record.nodes.add(number=number, step=pipeline_pb2.StepStatus(path=f"parts/{number}"))
    return record


class Workflow:
    """A workflow that answers until its present task fails, which Temporal reports by FAILED_PRECONDITION."""

    data_converter = data_converter
    namespace = "default"

    def __init__(self, *answers: internal_pb2.PipelineRecord | RPCError, events: Iterable[HistoryEvent] = ()) -> None:
        self.answers, self.events = [*answers], [*events]
        self.description: WorkflowExecutionDescription | None = None

    async def describe(self, **_: Any) -> WorkflowExecutionDescription:
        assert self.description is not None
        return self.description

    def get_workflow_handle(self, *_: Any, **__: Any) -> "Workflow":
        return self

    async def query(self, *_: Any, **__: Any) -> internal_pb2.PipelineRecord:
        if not self.answers:
            raise RPCError("the task is in a failed state", RPCStatusCode.FAILED_PRECONDITION, b"")
        if isinstance(answer := self.answers.pop(0), RPCError):
            raise answer
        return answer

    async def execute_update(self, *_: Any, **__: Any) -> None:
        told = ApplicationError("told", await self.query(), internal_pb2.DeliveryState(), type=names.TOLD)
        raise WorkflowUpdateFailedError(told)

    async def result(self, **_: Any) -> pipeline_pb2.PipelineResult:
        return pipeline_pb2.PipelineResult(usage={"output_tokens": 7})

    async def fetch_history_events(self, **_: Any) -> AsyncIterator[HistoryEvent]:
        for event in self.events:
            yield event


class InParts(Workflow):
    """A workflow that tells two nodes at once. Like Temporal, it answers an update as the first one of the same id."""

    def __init__(self, record: internal_pb2.PipelineRecord) -> None:
        super().__init__()
        self.record = record
        self.known: dict[str, int] = {}

    async def execute_update(self, *_: Any, args: Sequence[Any], id: str, **__: Any) -> None:  # noqa: A002
        first = self.known.setdefault(id, args[0].first_node if args else 0)
        nodes = self.record.nodes
        part = internal_pb2.PipelineRecord(
            status=self.record.status,
            version=self.record.version,
            nodes=nodes[first : first + 2],
            node_count=len(nodes),
        )
        raise WorkflowUpdateFailedError(ApplicationError("told", part, internal_pb2.DeliveryState(), type=names.TOLD))


def described(
    length: int,
    run: str = "a",
    status: WorkflowExecutionStatus = WorkflowExecutionStatus.RUNNING,
    left: pipeline_pb2.PipelineStatus | None = None,
) -> WorkflowExecutionDescription:
    """Return a description of a workflow whose memo has the status that it has left."""

    async def memo_value(_: str, default: Any = None) -> Any:
        return default if left is None else left

    raw = DescribeWorkflowExecutionResponse()
    raw.workflow_execution_info.first_run_id = run
    found = SimpleNamespace(
        id=ID, run_id=run, history_length=length, status=status, memo_value=memo_value, raw_description=raw
    )
    return cast("WorkflowExecutionDescription", found)


class NoDeliveries:
    """Deliveries of a pipeline that has none."""

    async def refresh(self, *_: Any) -> None:
        """Change nothing."""


def event_of(kind: "EventType.ValueType", **attributes: Any) -> HistoryEvent:
    return HistoryEvent(event_type=kind, **attributes)


RUN = internal_pb2.PipelineRun(pipeline={"user_id": "u", "request_id": "1", "custom": {"name": "essay"}})
STARTED = event_of(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED)
STARTED.workflow_execution_started_event_attributes.input.payloads.extend(
    data_converter.payload_converter.to_payloads([RUN])
)
SCHEDULED = event_of(EventType.EVENT_TYPE_WORKFLOW_TASK_SCHEDULED)
TAKEN = event_of(EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED)
DONE = event_of(EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED)
FAILED = event_of(EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED)
CANCEL = event_of(
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED,
    workflow_execution_signaled_event_attributes={"signal_name": names.SIGNAL_CANCEL},
)


def reading(workflow: Workflow) -> PipelineReader:
    client = cast("Client", workflow)
    return PipelineReader(client, cast("DeliveryReader", NoDeliveries()), Telling(client))


def reader_of(*answers: internal_pb2.PipelineRecord | RPCError, events: Iterable[HistoryEvent] = ()) -> PipelineReader:
    return reading(Workflow(*answers, events=events))


async def test_steps_and_counts_never_go_back_while_a_task_fails() -> None:
    """The tree was empty then, and its status without root."""
    reader = reader_of(record_of(2))
    await reader.record_of(described(50))
    for _ in range(2):
        found = await reader.record_of(described(52))
        assert found == record_of(2)
        # What a caller does with its own record is not remembered.
        found.status.cancel_requested = True


async def test_an_answer_that_comes_late_does_not_replace_a_newer_one() -> None:
    reader = reader_of(record_of(3), record_of(2))
    await reader.record_of(described(50))
    await reader.record_of(described(48))
    assert (await reader.record_of(described(52))).version == 3


async def test_what_a_crash_has_taken_back_is_not_told_while_a_task_fails() -> None:
    """The history is longer, and the tree is an older one."""
    reader = reader_of(record_of(3), record_of(2))
    await reader.record_of(described(50))
    await reader.record_of(described(51))
    found = await reader.look(described(52))
    assert (found.record.version, found.answered) == (2, False)


async def test_the_status_of_a_pipeline_that_ends_while_it_is_read_is_the_one_that_it_has_left() -> None:
    """A query that comes after its end is answered by a replay, which may find other times."""
    record = record_of(2)
    record.status.state = llm_pb2.JOB_STATE_SUCCEEDED
    left = pipeline_pb2.PipelineStatus()
    left.CopyFrom(record.status)
    record.status.root.end_time.seconds, left.root.end_time.seconds = 7, 8
    workflow = Workflow(record, record)
    reader = reading(workflow)
    workflow.description = described(52, status=WorkflowExecutionStatus.COMPLETED, left=left)
    assert (await reader.record_of(described(50))).status == left
    # Temporal does not have its end yet.
    workflow.answers, workflow.description = [record], described(50)
    with pytest.raises(ApiError):
        await reader.record_of(described(50))


async def test_a_gateway_that_has_not_seen_the_steps_says_that_the_pipeline_does_not_answer() -> None:
    """A run that goes on after a failure is another one: the steps of the earlier run are not its own."""
    reader = reader_of(record_of(2), events=(STARTED, SCHEDULED, TAKEN, DONE))
    await reader.record_of(described(50))
    with pytest.raises(ApiError) as raised:
        await reader.record_of(described(52, run="b"))
    assert raised.value.status.message == "the pipeline does not answer; call again"


@pytest.mark.parametrize(
    "events",
    [(SCHEDULED,), (SCHEDULED, TAKEN), (SCHEDULED, CANCEL), (SCHEDULED, TAKEN, CANCEL, CANCEL)],
    ids=["waits", "runs", "is cancelled", "is cancelled twice"],
)
async def test_a_pipeline_whose_first_task_is_not_done_has_its_whole_status(events: Sequence[HistoryEvent]) -> None:
    """It had no root, and did not answer once it had got a signal."""
    # The task may have ended since the pipeline was described.
    reader = reader_of(events=(STARTED, *events, DONE))
    found = await reader.record_of(described(1 + len(events)))
    expected = new_status(ID, RUN.pipeline, RUN.options)
    expected.cancel_requested = CANCEL in events
    assert found == internal_pb2.PipelineRecord(status=expected)
    assert found.status.root.state == pipeline_pb2.STEP_STATE_RUNNING


async def test_a_pipeline_whose_first_task_fails_does_not_answer() -> None:
    reader = reader_of(events=(STARTED, SCHEDULED, TAKEN, FAILED))
    with pytest.raises(ApiError, match="does not answer"):
        await reader.record_of(described(4))


async def test_a_pipeline_that_is_terminated_at_once_tells_what_it_was() -> None:
    """Temporal ends its first task as a failed one. It had neither a user nor a root."""
    closed = event_of(
        EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED,
        workflow_task_failed_event_attributes={"cause": "WORKFLOW_TASK_FAILED_CAUSE_FORCE_CLOSE_COMMAND"},
    )
    terminated = event_of(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED)
    reader = reader_of(events=(STARTED, SCHEDULED, TAKEN, closed, terminated))
    expected = new_status(ID, RUN.pipeline, RUN.options)
    expected.state = llm_pb2.JOB_STATE_CANCELLED
    assert (await reader.record_of(described(5, status=WorkflowExecutionStatus.TERMINATED))).status == expected


async def test_a_pipeline_that_was_started_by_hand_with_something_else_has_its_id_and_state() -> None:
    started = event_of(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED)
    status = (await reader_of(events=(started, SCHEDULED)).record_of(described(2))).status
    assert status == pipeline_pb2.PipelineStatus(pipeline_id=ID, state=llm_pb2.JOB_STATE_RUNNING)


@pytest.mark.parametrize("seen", [[], [record_of(2)]], ids=["", "seen"])
async def test_a_pipeline_that_an_operator_has_ended_has_its_id_where_its_workflow_does_not_answer(
    seen: list[internal_pb2.PipelineRecord],
) -> None:
    reader = reader_of(*seen)
    for _ in seen:
        await reader.record_of(described(50))
    found = await reader.record_of(described(52, status=WorkflowExecutionStatus.TERMINATED))
    assert (found.status.pipeline_id, found.status.state) == (ID, llm_pb2.JOB_STATE_CANCELLED)


async def test_an_ended_pipeline_whose_workflow_has_no_time_to_answer_is_asked_again() -> None:
    """It was answered without steps, as one whose code has changed."""
    left = new_status(ID, RUN.pipeline, RUN.options)
    left.state = llm_pb2.JOB_STATE_SUCCEEDED
    ended = described(52, status=WorkflowExecutionStatus.COMPLETED, left=left)
    late = RPCError("Timeout expired", RPCStatusCode.CANCELLED, b"")
    reader = reading(Workflow(late, record_of(2)))
    with pytest.raises(RPCError, match="Timeout expired"):
        await reader.record_of(ended)
    found = await reader.record_of(ended)
    assert len(found.nodes) == 2
    assert found.result.usage.output_tokens == 7, "a workflow tells no result that has no room beside its tree"


async def test_what_is_told_in_parts_is_one_record() -> None:
    reader = reading(InParts(record_of(5)))
    for _ in range(2):
        assert (await reader.look(described(50))).record == record_of(5)


async def test_all_parts_have_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each had ten seconds: a caller of a large tree, whose tasks take long, waited for minutes."""
    monkeypatch.setattr(told, "RPC_TIMEOUT", timedelta(seconds=0.2))

    class Slow(InParts):
        async def execute_update(self, *_: Any, **arguments: Any) -> None:
            if self.is_slow:
                await asyncio.sleep(0.1)
            await super().execute_update(**arguments)

        is_slow = False

    workflow = Slow(record_of(50))
    reader = reading(workflow)
    await reader.look(described(50))
    workflow.is_slow = True
    async with asyncio.timeout(1):
        found = await reader.look(described(50))
    assert (found.record.version, found.answered) == (50, False)


@pytest.mark.parametrize(
    "status", [RPCStatusCode.RESOURCE_EXHAUSTED, RPCStatusCode.UNAVAILABLE], ids=lambda one: one.name
)
async def test_a_pipeline_with_too_many_updates_has_its_last_record(status: RPCStatusCode) -> None:
    reader = reader_of(record_of(2), RPCError("ten are in flight", status, b""))
    await reader.record_of(described(50))
    found = await reader.look(described(50))
    assert (found.record.version, found.answered) == (2, False)
