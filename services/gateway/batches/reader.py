"""Reads batches from Temporal: the record of each, and its status with what its chunks report while they run."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from temporalio.client import (
    Client,
    WorkflowExecution,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
)

from jobs import batches, names
from jobs.ids import trace_id
from jobs.memo import from_memo, time_from_memo
from llm_pb import batch_pb2, internal_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from runtime.shared_calls import SharedCalls
from services.gateway.batches.pending import PendingChunk, pending_chunks, with_earlier
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.errors import batch_not_found
from services.gateway.job_traces import traceparent_of
from services.gateway.own_work import describe_own, events_of_start, no_answer, query_record
from services.gateway.runs import Runs

_RATE_OVER: Final = timedelta(minutes=1)
_MAX_RATES: Final = 1000
_MAX_RECORDS: Final = 32
"""Number of records that are remembered. Those of long batches have some 100 KB."""
_CLOSED_STATES: Final = {
    WorkflowExecutionStatus.COMPLETED: batch_pb2.BATCH_STATE_SUCCEEDED,
    WorkflowExecutionStatus.FAILED: batch_pb2.BATCH_STATE_FAILED,
    WorkflowExecutionStatus.CANCELED: batch_pb2.BATCH_STATE_CANCELLED,
    WorkflowExecutionStatus.TERMINATED: batch_pb2.BATCH_STATE_CANCELLED,
    WorkflowExecutionStatus.TIMED_OUT: batch_pb2.BATCH_STATE_EXPIRED,
}


class BatchView(NamedTuple):
    """A batch at one moment."""

    record: internal_pb2.BatchRecord
    """Its status is complete: running chunks are added."""
    pending: Sequence[PendingChunk]
    """The chunks that are not in the record."""


class BatchReader:
    """Reads batches."""

    def __init__(self, client: Client, deliveries: DeliveryReader) -> None:
        self._client = client
        self._deliveries = deliveries
        self._runs = Runs(client)
        self._shared = SharedCalls()
        self._rates: OrderedDict[str, deque[tuple[float, int, int]]] = OrderedDict()
        """By batch: time, output tokens and ended items, as they were seen."""
        self._records: OrderedDict[tuple[str, str, str, int], internal_pb2.BatchRecord] = OrderedDict()
        """By batch, its first run, its present one and the length of that one's history. A query costs a workflow task,
        and would return the same."""

    async def describe(self, caller: Caller, batch_id: str) -> WorkflowExecutionDescription:
        """Return Temporal's description of a batch that the caller may see. Raises ApiError NOT_FOUND, RPCError."""
        found = await describe_own(self._runs, caller, batch_id, names.BATCH_WORKFLOW_TYPE)
        if found is None:
            raise batch_not_found(batch_id)
        return found

    async def was_deleted(self, batch_id: str) -> bool:
        """Return whether a deletion keeps the id. Raises RPCError."""
        return await self._runs.was_deleted(batch_id)

    async def has_gone_on(self, execution: WorkflowExecution) -> bool:
        """Return whether a later run has the id of a batch, or a deletion keeps it. Raises RPCError."""
        return await self._runs.has_gone_on(execution)

    async def status(self, caller: Caller, batch_id: str) -> batch_pb2.BatchStatus:
        """Return the status of a batch. Raises like view()."""
        return (await self.view(caller, batch_id)).record.status

    async def readable_status(self, caller: Caller, batch_id: str) -> batch_pb2.BatchStatus:
        """Return a copy of the status of a batch, or as much of it as is readable after its keys were deleted.

        Raises like view(), but no PayloadError.
        """
        status = batch_pb2.BatchStatus()
        try:
            status.CopyFrom(await self.status(caller, batch_id))
        except PayloadError:
            status = unreadable_status(await self.describe(caller, batch_id))
        return status

    async def view(self, caller: Caller, batch_id: str) -> BatchView:
        """Return a batch as it is now. Concurrent calls share the answer.

        Raises ApiError NOT_FOUND; UNAVAILABLE and RPCError when Temporal or the workflow worker does not answer;
        PayloadError, KeysUnavailable.
        """
        return await self._shared.fresh((caller.tenant, caller.user_id, batch_id), lambda: self._view(caller, batch_id))

    async def _view(self, caller: Caller, batch_id: str) -> BatchView:
        return await self.view_of(await self.describe(caller, batch_id))

    async def view_of(self, description: WorkflowExecutionDescription) -> BatchView:
        """Return a batch that was just described, as view() does."""
        record = await ended_record(description)
        if record is not None:
            status = record.status
            await self._deliveries.refresh(status.batch_id, description.run_id, status.notifications)
            return BatchView(record, ())
        if description.status != WorkflowExecutionStatus.RUNNING:
            # An operator has ended it, or its code has failed: what it knew is all there is.
            record = await self._ask(description)
            bare = await bare_status(description)
            record.status.state = bare.state
            record.status.end_time.CopyFrom(bare.end_time)
            return _view(record, ())
        record = await self._ask(description)
        view = _view(record, await pending_chunks(description, self._client.data_converter))
        self._add_rate(record.status)
        return view

    async def _ask(self, description: WorkflowExecutionDescription) -> internal_pb2.BatchRecord:
        """Return the record as the workflow has it. The caller may change it."""
        key = (description.id, _first_run(description), description.run_id, description.history_length)
        asked = internal_pb2.BatchRecord()
        if (record := self._records.get(key)) is None:
            record = await self._query(description)
            self._records[key] = record
            if len(self._records) > _MAX_RECORDS:
                self._records.popitem(last=False)
        asked.CopyFrom(record)
        return asked

    async def _query(self, description: WorkflowExecutionDescription) -> internal_pb2.BatchRecord:
        record = await query_record(self._client, description, internal_pb2.BatchRecord, "batch")
        if record is not None:
            return record
        # A batch that runs again as the step of a pipeline is another one under the same id.
        for (id_, first_run, _, _), last in reversed(self._records.items()):
            if (id_, first_run) == (description.id, _first_run(description)) and last.status.counts.total:
                return last
        if not await events_of_start(self._client, description):
            raise no_answer("batch")
        return internal_pb2.BatchRecord(status=await bare_status(description))

    def _add_rate(self, status: batch_pb2.BatchStatus) -> None:
        """Add the rate of tokens and the expected end, by what was seen in the last minute or else since the start."""
        if status.state != batch_pb2.BATCH_STATE_RUNNING or not status.HasField("start_time"):
            self._rates.pop(status.batch_id, None)
            return
        now, ended = time.time(), batches.ended(status.counts)
        seen = self._rates.setdefault(status.batch_id, deque())
        self._rates.move_to_end(status.batch_id)
        if len(self._rates) > _MAX_RATES:
            self._rates.popitem(last=False)
        while len(seen) > 1 and seen[1][0] < now - _RATE_OVER.total_seconds():
            seen.popleft()
        if not seen or now - seen[-1][0] > 1:
            seen.append((now, status.usage.output_tokens, ended))
        since, tokens, items = seen[0]
        if now - since < _RATE_OVER.total_seconds() / 6:
            since, tokens, items = status.start_time.ToDatetime(UTC).timestamp(), 0, 0
        seconds = max(now - since, 1e-3)
        status.tokens_per_second = max(status.usage.output_tokens - tokens, 0) / seconds
        if (pace := (ended - items) / seconds) > 0:
            left = timedelta(seconds=(status.counts.total - ended) / pace)
            status.estimated_end_time.FromDatetime(datetime.now(UTC) + min(left, timedelta(days=3650)))


def _first_run(description: WorkflowExecutionDescription) -> str:
    """Return what all runs of a batch have in common that continue each other."""
    return str(description.raw_description.workflow_execution_info.first_run_id)


def _view(record: internal_pb2.BatchRecord, chunks: Sequence[PendingChunk]) -> BatchView:
    """Return the view of a batch that has not ended, and add to its status what its chunks have done."""
    # A chunk may have ended after it was seen as pending. The record then has it.
    known = {*(chunk.chunk for chunk in record.progress.recent), *record.written_chunks}
    pending = [chunk for chunk in with_earlier(chunks, record.begun_chunks) if chunk.ended.chunk not in known]
    status = record.status
    for chunk in pending:
        result = chunk.ended.result
        batches.add_counts(status.counts, result.counts)
        if batches.done_count(result):
            batches.add_usage(status.usage, result.usage)
        status.counts.running += result.counts.running if chunk.runs else 0
    return BatchView(record, pending)


async def ended_record(execution: WorkflowExecution) -> internal_pb2.BatchRecord | None:
    """Return the record that a batch has left at its end; None before. Raises PayloadError, KeysUnavailable."""
    if execution.status == WorkflowExecutionStatus.RUNNING:
        return None
    try:
        status = from_memo(await execution.memo_value(names.MEMO_STATUS, None), batch_pb2.BatchStatus)
        progress = from_memo(await execution.memo_value(names.MEMO_RECORD, None), internal_pb2.BatchProgress)
        chosen = from_memo(await execution.memo_value(names.MEMO_OPTIONS, None), internal_pb2.BatchOptions)
    except ValueError:
        # A workflow that was started by hand may hold anything.
        return None
    if status is None or status.state not in batches.FINAL_STATES:
        return None
    return internal_pb2.BatchRecord(status=status, progress=progress, options=chosen)


async def bare_status(execution: WorkflowExecution) -> batch_pb2.BatchStatus:
    """Return what Temporal itself tells of a batch."""
    status = batch_pb2.BatchStatus(batch_id=execution.id, state=batch_pb2.BATCH_STATE_VALIDATING)
    if execution.status is not None and execution.status != WorkflowExecutionStatus.RUNNING:
        status.state = _CLOSED_STATES.get(execution.status, batch_pb2.BATCH_STATE_FAILED)
        if execution.close_time is not None:
            status.end_time.FromDatetime(execution.close_time)
    created = time_from_memo(await execution.memo_value(names.MEMO_CREATE_TIME, None))
    if created is not None:
        status.create_time.CopyFrom(created)
    else:
        status.create_time.FromDatetime(execution.start_time)
    chosen = from_memo(await execution.memo_value(names.MEMO_OPTIONS, None), internal_pb2.BatchOptions)
    if chosen is not None and chosen.HasField("expire_time"):
        status.expire_time.CopyFrom(chosen.expire_time)
    status.trace_id = trace_id(await traceparent_of(execution))
    return status


def unreadable_status(execution: WorkflowExecution) -> batch_pb2.BatchStatus:
    """Return what Temporal itself tells of a batch in clear: its state and its times. An open one is RUNNING."""
    status = batch_pb2.BatchStatus(batch_id=execution.id, state=batch_pb2.BATCH_STATE_RUNNING)
    status.create_time.FromDatetime(execution.start_time)
    if execution.status is not None and execution.status != WorkflowExecutionStatus.RUNNING:
        outcome = execution.typed_search_attributes.get(names.JOB_STATE) or ""
        otherwise = _CLOSED_STATES.get(execution.status, batch_pb2.BATCH_STATE_FAILED)
        status.state = dict(batch_pb2.BatchState.items()).get(outcome, otherwise)
        if execution.close_time is not None:
            status.end_time.FromDatetime(execution.close_time)
    return status


async def wait_a_moment(stopping: asyncio.Event, seconds: float) -> bool:
    """Wait so long, and return whether the gateway stops."""
    try:
        async with asyncio.timeout(seconds):
            await stopping.wait()
    except TimeoutError:
        return False
    return True
