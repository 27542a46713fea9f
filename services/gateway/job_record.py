"""What Temporal's record of a workflow, a description or an item of a list, holds about a job."""

import logging
from collections.abc import Mapping
from typing import Final

from temporalio.client import WorkflowExecution, WorkflowExecutionDescription, WorkflowExecutionStatus

from jobs import ids, names
from jobs.memo import from_memo, time_from_memo
from llm_pb import llm_pb2
from payload_converter import MAX_PAYLOAD_BYTES
from services.gateway.job_traces import traceparent_of

_log = logging.getLogger(__name__)
FINAL_STATES: Final = frozenset(
    {
        llm_pb2.JOB_STATE_SUCCEEDED,
        llm_pb2.JOB_STATE_FAILED,
        llm_pb2.JOB_STATE_CANCELLED,
        llm_pb2.JOB_STATE_TIMED_OUT,
    }
)
CLOSED_STATES: Final[Mapping[WorkflowExecutionStatus, "llm_pb2.JobState.ValueType"]] = {
    WorkflowExecutionStatus.COMPLETED: llm_pb2.JOB_STATE_SUCCEEDED,
    WorkflowExecutionStatus.FAILED: llm_pb2.JOB_STATE_FAILED,
    WorkflowExecutionStatus.CANCELED: llm_pb2.JOB_STATE_CANCELLED,
    WorkflowExecutionStatus.TERMINATED: llm_pb2.JOB_STATE_CANCELLED,
    WorkflowExecutionStatus.TIMED_OUT: llm_pb2.JOB_STATE_TIMED_OUT,
}
"""The state of a job by how its workflow closed, where its record has no outcome."""

FIRST_RUN_EVENTS: Final = 6
"""Maximum number of events in a history without result and hand-over: the first task, and two scheduled activities."""


async def expected_result_bytes(description: WorkflowExecutionDescription) -> int:
    """Return the maximum size, in bytes, of the result of a job that was just described.

    Where the memo does not hold it, that is half of the history: a result is in the event that ends the activity and in
    the one that ends the workflow. The prompt is in the two events that start them.
    """
    if description.status == WorkflowExecutionStatus.RUNNING and description.history_length <= FIRST_RUN_EVENTS:
        return 0
    size = await description.memo_value(names.MEMO_RESULT_BYTES, None)
    # A workflow that was started by hand may hold anything.
    if description.status != WorkflowExecutionStatus.RUNNING and isinstance(size, int) and size >= 0:
        return min(size, MAX_PAYLOAD_BYTES)
    if description.status in (WorkflowExecutionStatus.TERMINATED, WorkflowExecutionStatus.TIMED_OUT):
        # The result is read from the feed, if at all.
        return MAX_PAYLOAD_BYTES
    history_bytes: int = description.raw_description.workflow_execution_info.history_size_bytes
    return min(history_bytes // 2, MAX_PAYLOAD_BYTES)


async def base_status(execution: WorkflowExecution) -> llm_pb2.JobStatus:
    """Return the status that a description or a listing of a workflow holds without its activities.

    The state of an open job is RUNNING: neither holds whether a worker has the job.
    """
    final = await final_status(execution)
    if final is not None:
        return final
    state = (
        llm_pb2.JOB_STATE_RUNNING
        if execution.status is None
        else CLOSED_STATES.get(execution.status, llm_pb2.JOB_STATE_RUNNING)
    )
    outcome = execution.typed_search_attributes.get(names.JOB_STATE)
    if state == llm_pb2.JOB_STATE_FAILED and outcome == "JOB_STATE_TIMED_OUT":
        state = llm_pb2.JOB_STATE_TIMED_OUT
    trace_id = ids.trace_id(await traceparent_of(execution))
    status = llm_pb2.JobStatus(workflow_id=execution.id, run_id=execution.run_id, state=state, trace_id=trace_id)
    await set_times(status, execution)
    return status


async def final_status(execution: WorkflowExecution) -> llm_pb2.JobStatus | None:
    """Return the status that the workflow wrote as it closed; None while it is open, or when it wrote none."""
    if execution.status in (None, WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.TERMINATED):
        return None
    try:
        return from_memo(await execution.memo_value(names.MEMO_STATUS, None), llm_pb2.JobStatus)
    except ValueError as error:
        # A workflow that was started by hand may hold anything.
        _log.info("the memo of %s has a status that %s", execution.id, error)
        return None


async def set_times(status: llm_pb2.JobStatus, execution: WorkflowExecution) -> None:
    """Write into the status when the job was accepted and, unless it is set already, when it ended."""
    accepted = time_from_memo(await execution.memo_value(names.MEMO_CREATE_TIME, None))
    if accepted is not None:
        status.create_time.CopyFrom(accepted)
    else:
        # An earlier version, or no gateway, has started it.
        status.create_time.FromDatetime(execution.start_time)
    if execution.close_time is not None and not status.HasField("end_time"):
        status.end_time.FromDatetime(execution.close_time)
