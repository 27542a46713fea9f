"""Reads pipelines from Temporal: the status from the memo of a closed one, the tree from the workflow."""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import (
    Client,
    WorkflowExecution,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
)
from temporalio.converter import WorkflowSerializationContext
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.errors import reason_of
from jobs.ids import trace_id
from jobs.memo import from_memo
from jobs.pipelines import FINAL_STATES, INCOMPLETE, STEP_STATES, new_status
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from runtime.temporal import RPC_TIMEOUT
from services.gateway import job_record
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.errors import pipeline_not_found
from services.gateway.job_inputs import input_of
from services.gateway.job_traces import traceparent_of
from services.gateway.own_work import describe_own, events_of_start, no_answer, query_record
from services.gateway.runs import Runs
from services.gateway.told import Telling

_log = logging.getLogger(__name__)
_MAX_RECORDS: Final = 32
"""Number of records that are remembered. Those of many steps have some 300 KB."""
_NO_TASK: Final = (
    RPCStatusCode.FAILED_PRECONDITION,
    RPCStatusCode.DEADLINE_EXCEEDED,
    RPCStatusCode.RESOURCE_EXHAUSTED,
    RPCStatusCode.UNAVAILABLE,
)
"""How Temporal refuses an update of a pipeline whose task fails, which no worker runs, or which has ten already, or how
it gives one up. It may also be away since the pipeline was described: then the next call says so."""


class Look(NamedTuple):
    """What was found of a pipeline."""

    record: internal_pb2.PipelineRecord
    answered: bool
    """Whether the tree is the present one. False: the workflow did not answer, and this is what is known of before."""


class PipelineReader:
    """Reads pipelines."""

    def __init__(self, client: Client, deliveries: DeliveryReader, telling: Telling) -> None:
        self._client = client
        self._deliveries = deliveries
        self._telling = telling
        self._runs = Runs(client)
        self._records: OrderedDict[tuple[str, str], tuple[int, internal_pb2.PipelineRecord]] = OrderedDict()
        """The last record that was read, by pipeline and run, with the length of the history then."""

    async def describe(self, caller: Caller, pipeline_id: str) -> WorkflowExecutionDescription:
        """Return Temporal's description of a pipeline that the caller may see. Raises ApiError NOT_FOUND, RPCError."""
        found = await describe_own(self._runs, caller, pipeline_id, names.PIPELINE_WORKFLOW_TYPE)
        if found is None:
            raise pipeline_not_found(pipeline_id)
        return found

    async def was_deleted(self, pipeline_id: str) -> bool:
        """Return whether a deletion keeps the id. Raises RPCError."""
        return await self._runs.was_deleted(pipeline_id)

    async def has_gone_on(self, execution: WorkflowExecution) -> bool:
        """Return whether a later run has the id of a pipeline, or a deletion keeps it. Raises RPCError."""
        return await self._runs.has_gone_on(execution)

    async def read(self, caller: Caller, pipeline_id: str) -> internal_pb2.PipelineRecord:
        """Return a pipeline as it is now. Raises like describe() and record_of()."""
        return await self.record_of(await self.describe(caller, pipeline_id))

    async def readable_status(self, caller: Caller, pipeline_id: str) -> pipeline_pb2.PipelineStatus:
        """Return the status of a pipeline, or as much of it as is readable after its keys were deleted.

        Raises like read(), but no PayloadError.
        """
        description = await self.describe(caller, pipeline_id)
        try:
            return (await self.record_of(description)).status
        except PayloadError:
            return bare_status(description)

    async def record_of(self, description: WorkflowExecutionDescription) -> internal_pb2.PipelineRecord:
        """Return a pipeline that was just described. Raises like look()."""
        return (await self.look(description)).record

    async def look(self, description: WorkflowExecutionDescription) -> Look:
        """Return a pipeline that was just described, and whether it is the present one.

        Raises ApiError UNAVAILABLE and RPCError when Temporal or the workflow worker does not answer; PayloadError,
        KeysUnavailable.
        """
        if description.status == WorkflowExecutionStatus.RUNNING:
            found = await self._ask(description)
            if found.record.status.state not in FINAL_STATES:
                return found
            # It has ended since. What counts is in its memo: a replay, which may have answered, finds other times.
            again = await self._runs.describe(description.id, description.run_id)
            if again is None or again.status == WorkflowExecutionStatus.RUNNING:
                raise no_answer("pipeline")
            description = again
        status = await closed_status(description)
        try:
            record, answered = await self._ask(description)
        except RPCError:
            # Temporal or the workflow worker has no time for it now. The tree is there.
            raise
        except Exception as error:  # noqa: BLE001  # whatever keeps the code of then from running now
            _log.warning("the tree of %s cannot be read: %r", description.id, error)
            record, answered = internal_pb2.PipelineRecord(status=status), False
        has_result = status.state == llm_pb2.JOB_STATE_SUCCEEDED or reason_of(status.root.error) == INCOMPLETE
        # The answer to a query has no room for a result beside a large tree.
        if has_result and not record.HasField("result") and (result := await self._result(description)) is not None:
            record.result.CopyFrom(result)
        if status.state in FINAL_STATES and not status.HasField("root"):
            # An operator has ended it: what it knew is all there is.
            known, state = record.status, status.state
            known.state = state
            status = known
        record.status.CopyFrom(status)
        await self._deliveries.refresh(description.id, description.run_id, record.status.notifications)
        return Look(record, answered)

    async def _ask(self, description: WorkflowExecutionDescription) -> Look:
        record = await self._told(description)
        if record is not None:
            self._remember(description, record)
            return Look(record, answered=True)
        if (last := self._records.get((description.id, description.run_id))) is not None:
            record = internal_pb2.PipelineRecord()
            record.CopyFrom(last[1])
            return Look(record, answered=False)
        if not (events := await events_of_start(self._client, description)):
            raise no_answer("pipeline")
        first = internal_pb2.PipelineRecord(status=await self._status_of_start(description, events))
        return Look(first, answered=True)

    async def _told(self, description: WorkflowExecutionDescription) -> internal_pb2.PipelineRecord | None:
        """Return what a pipeline tells; None if it does not answer: its task fails, or none has been done in time."""
        try:
            told = await self._telling.ask(description)
        except RPCError as error:
            if error.status not in _NO_TASK:
                raise
            return None
        if told is None:
            return await query_record(self._client, description, internal_pb2.PipelineRecord, "pipeline")
        record = internal_pb2.PipelineRecord()
        record.CopyFrom(told.record)
        return record

    async def _status_of_start(
        self, description: WorkflowExecutionDescription, events: Sequence[HistoryEvent]
    ) -> pipeline_pb2.PipelineStatus:
        """Return the status of a pipeline whose code has not run yet. Raises PayloadError, KeysUnavailable."""
        status = await closed_status(description)
        context = WorkflowSerializationContext(namespace=self._client.namespace, workflow_id=description.id)
        converter = self._client.data_converter.with_context(context)
        # A workflow that was started by hand may hold anything.
        if (run := await input_of(events[0], converter, internal_pb2.PipelineRun)) is not None:
            first = new_status(description.id, run.pipeline, run.options)
            first.trace_id = status.trace_id
            status = first
        signals = (event.workflow_execution_signaled_event_attributes.signal_name for event in events)
        status.cancel_requested = names.SIGNAL_CANCEL in signals
        return status

    def _remember(self, description: WorkflowExecutionDescription, record: internal_pb2.PipelineRecord) -> None:
        key, length = (description.id, description.run_id), description.history_length
        known, last = self._records.setdefault(key, (-1, internal_pb2.PipelineRecord()))
        # A crash may have taken versions back. Then the history is longer, and the tree is an older one.
        if length > known or record.version >= last.version:
            # The caller may change its own.
            last.CopyFrom(record)
            self._records[key] = max(length, known), last
        self._records.move_to_end(key)
        if len(self._records) > _MAX_RECORDS:
            self._records.popitem(last=False)

    async def _result(self, description: WorkflowExecutionDescription) -> pipeline_pb2.PipelineResult | None:
        """Return what a closed pipeline has left; None without anything."""
        if description.status not in (WorkflowExecutionStatus.COMPLETED, WorkflowExecutionStatus.FAILED):
            return None
        handle = self._client.get_workflow_handle(
            description.id, run_id=description.run_id, result_type=pipeline_pb2.PipelineResult
        )
        try:
            result: pipeline_pb2.PipelineResult = await handle.result(rpc_timeout=RPC_TIMEOUT)
        except WorkflowFailureError as error:
            details = error.cause.details if isinstance(error.cause, ApplicationError) else ()
            found = (detail for detail in details if isinstance(detail, pipeline_pb2.PipelineResult))
            return next((result for result in found if result.HasField("value")), None)
        return result


async def closed_status(execution: WorkflowExecution) -> pipeline_pb2.PipelineStatus:
    """Return the status that a pipeline has left at its end, or what Temporal itself tells of one.

    Raises PayloadError, KeysUnavailable.
    """
    try:
        status = from_memo(await execution.memo_value(names.MEMO_STATUS, None), pipeline_pb2.PipelineStatus)
    except ValueError:
        # A workflow that was started by hand may hold anything.
        status = None
    if status is not None and execution.status != WorkflowExecutionStatus.RUNNING:
        return status
    state = llm_pb2.JOB_STATE_RUNNING
    if execution.status is not None:
        state = job_record.CLOSED_STATES.get(execution.status, state)
    return pipeline_pb2.PipelineStatus(
        pipeline_id=execution.id, state=state, trace_id=trace_id(await traceparent_of(execution))
    )


def bare_status(execution: WorkflowExecution) -> pipeline_pb2.PipelineStatus:
    """Return what Temporal itself tells of a pipeline in clear: its state and its times."""
    told = job_record.bare_status(execution)
    status = pipeline_pb2.PipelineStatus(pipeline_id=execution.id, state=told.state)
    status.root.state = STEP_STATES.get(told.state, pipeline_pb2.STEP_STATE_RUNNING)
    status.root.kind = pipeline_pb2.STEP_KIND_PIPELINE
    status.root.start_time.CopyFrom(told.create_time)
    if told.HasField("end_time"):
        status.root.end_time.CopyFrom(told.end_time)
    return status


async def used_tokens(description: WorkflowExecutionDescription) -> int:
    """Return the output tokens that this run of a closed pipeline has used; -1 where it was ended by force.

    Raises PayloadError, KeysUnavailable.
    """
    status = await closed_status(description)
    if not status.HasField("root"):
        return -1
    recalled = await description.memo_value(names.MEMO_RECALLED_TOKENS, 0)
    return status.root.usage.output_tokens - (int(recalled) if isinstance(recalled, int | float) else 0)


async def reservation_of(description: WorkflowExecutionDescription) -> int:
    """Return the reservation with which this run of a pipeline was started, as in ReserveRequest.

    0 for other work, and where it can never be read again. Raises KeysUnavailable.
    """
    create_time = Timestamp()
    if description.workflow_type == names.PIPELINE_WORKFLOW_TYPE:
        with contextlib.suppress(ValueError, PayloadError):
            create_time.FromJsonString(str(await description.memo_value(names.MEMO_CREATE_TIME, "")))
    return create_time.ToNanoseconds()
