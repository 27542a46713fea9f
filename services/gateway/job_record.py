"""What Temporal's record of a workflow tells of a job by itself: a description of it, or its line in a list."""

import logging
from collections.abc import Mapping
from typing import Final

from temporalio.client import WorkflowExecution, WorkflowExecutionDescription, WorkflowExecutionStatus

from jobs import ids, names
from jobs.memo import from_memo
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
"""The state of a job whose workflow closed so, where nothing says more."""

FIRST_RUN_EVENTS: Final = 6
"""A history without more events holds no result and no hand-over: the first task's and two scheduled activities."""


async def expected_result_bytes(description: WorkflowExecutionDescription) -> int:
    """Return how large the result of a job that was just described may be, in bytes.

    Where the job does not say, half of its history: a result is in the event that ends the activity, and in the one
    that ends the workflow. So is the prompt, in the events that begin them.
    """
    if description.status == WorkflowExecutionStatus.RUNNING and description.history_length <= FIRST_RUN_EVENTS:
        return 0
    size = await description.memo_value(names.MEMO_RESULT_BYTES, None)
    # Whoever starts a workflow by hand may have written anything.
    if description.status != WorkflowExecutionStatus.RUNNING and isinstance(size, int) and size >= 0:
        return min(size, MAX_PAYLOAD_BYTES)
    if description.status in (WorkflowExecutionStatus.TERMINATED, WorkflowExecutionStatus.TIMED_OUT):
        # Read from the feed, if at all.
        return MAX_PAYLOAD_BYTES
    history_bytes: int = description.raw_description.workflow_execution_info.history_size_bytes
    return min(history_bytes // 2, MAX_PAYLOAD_BYTES)


async def base_status(execution: WorkflowExecution) -> llm_pb2.JobStatus:
    """Return what a description or a listing of a workflow tells without its activities.

    For an open job the state is RUNNING: neither tells whether a worker has it.
    """
    final = await final_status(execution)
    if final is not None:
        return final
    status = bare_status(execution)
    status.trace_id = ids.trace_id(await traceparent_of(execution))
    return status


def bare_status(execution: WorkflowExecution) -> llm_pb2.JobStatus:
    """Return what a description or a listing tells without the memo, which may be encrypted."""
    state = (
        llm_pb2.JOB_STATE_RUNNING
        if execution.status is None
        else CLOSED_STATES.get(execution.status, llm_pb2.JOB_STATE_RUNNING)
    )
    outcome = execution.typed_search_attributes.get(names.JOB_STATE)
    if state == llm_pb2.JOB_STATE_FAILED and outcome == "JOB_STATE_TIMED_OUT":
        state = llm_pb2.JOB_STATE_TIMED_OUT
    status = llm_pb2.JobStatus(workflow_id=execution.id, run_id=execution.run_id, state=state)
    set_times(status, execution)
    return status


async def final_status(execution: WorkflowExecution) -> llm_pb2.JobStatus | None:
    """Return what the workflow has left as it closed; None of one that is open, or did not get so far."""
    if execution.status in (None, WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.TERMINATED):
        return None
    try:
        return from_memo(await execution.memo_value(names.MEMO_STATUS, None), llm_pb2.JobStatus)
    except ValueError as error:
        # Whoever starts a workflow by hand may have written anything.
        _log.info("the memo of %s has a status that %s", execution.id, error)
        return None


def set_times(status: llm_pb2.JobStatus, execution: WorkflowExecution) -> None:
    """Write into the status when the job began and, unless it says so already, when it ended."""
    status.create_time.FromDatetime(execution.start_time)
    if execution.close_time is not None and not status.HasField("end_time"):
        status.end_time.FromDatetime(execution.close_time)
