"""What Temporal's record of a workflow, a description or an item of a list, holds about a job."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from temporalio.client import WorkflowExecution, WorkflowExecutionDescription, WorkflowExecutionStatus

from encryption import KeysUnavailable, is_hash
from jobs import ids, names
from jobs.costs import add_cost
from jobs.memo import from_memo, time_from_memo
from llm_pb import common_pb2, internal_pb2, llm_pb2
from payload_converter import MAX_PAYLOAD_BYTES, PayloadError
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
UNSETTLED_STATES: Final = frozenset({llm_pb2.JOB_STATE_QUEUED, llm_pb2.JOB_STATE_RUNNING})
"""The states of a job that counts as open for its tenant's quota."""
CLOSED_STATES: Final[Mapping[WorkflowExecutionStatus, "llm_pb2.JobState.ValueType"]] = {
    WorkflowExecutionStatus.COMPLETED: llm_pb2.JOB_STATE_SUCCEEDED,
    WorkflowExecutionStatus.FAILED: llm_pb2.JOB_STATE_FAILED,
    WorkflowExecutionStatus.CANCELED: llm_pb2.JOB_STATE_CANCELLED,
    WorkflowExecutionStatus.TERMINATED: llm_pb2.JOB_STATE_CANCELLED,
    WorkflowExecutionStatus.TIMED_OUT: llm_pb2.JOB_STATE_TIMED_OUT,
}
"""The state of a job by how its workflow closed, where its record has no outcome."""

_MAX_INT64: Final = 2**63 - 1

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


async def user_of(execution: WorkflowExecution) -> str:
    """Return who a job is for. Empty for one that was started by hand without saying so, or that is unreadable.

    Raises KeysUnavailable where the user cannot be decrypted now.
    """
    value = execution.typed_search_attributes.get(names.USER_ID) or ""
    if not is_hash(value):
        return value
    with suppress(PayloadError):
        return (await _hashed_attributes(execution)).get(names.USER_ID.name, "")
    return ""


async def search_attributes_of(execution: WorkflowExecution) -> dict[str, str]:
    """Return the search attributes by name. Those that are hashed are in the memo, and absent if it is unreadable."""
    keys = (names.USER_ID, names.REQUEST_ID, names.MODEL, names.PROJECT_ID)
    values = {key.name: execution.typed_search_attributes.get(key) or "" for key in keys}
    if not any(map(is_hash, values.values())):
        return values
    clear = {name: value for name, value in values.items() if not is_hash(value)}
    with suppress(PayloadError, KeysUnavailable):
        clear = {**await _hashed_attributes(execution), **clear}
    return clear


def job_class_of(execution: WorkflowExecution) -> "common_pb2.JobClass.ValueType":
    """Return the class of a job, JOB_CLASS_STANDARD if its search attributes name none that this version knows."""
    name = execution.typed_search_attributes.get(names.JOB_CLASS) or ""
    known = common_pb2.JobClass.DESCRIPTOR.values_by_name.get(name)
    return common_pb2.JOB_CLASS_STANDARD if known is None else common_pb2.JobClass.Value(name)


async def _hashed_attributes(execution: WorkflowExecution) -> dict[str, str]:
    """Return the values of the search attributes that are hashed. Raises PayloadError, KeysUnavailable."""
    return _texts(await execution.memo_value(names.MEMO_SEARCH_ATTRIBUTES, None))


async def labels_of(execution: WorkflowExecution) -> dict[str, str]:
    """Return the labels of a job. Empty for one that was started by hand, or that is unreadable."""
    with suppress(PayloadError, KeysUnavailable):
        return _texts(await execution.memo_value(names.MEMO_LABELS, None))
    return {}


async def cost_of(execution: WorkflowExecution) -> int | None:
    """Return what the result of a closed job costs, as its workflow wrote it; None without one, or if unreadable."""
    with suppress(PayloadError, KeysUnavailable):
        cost = await execution.memo_value(names.MEMO_COST_MICROS, None)
        # A workflow that was started by hand may hold anything.
        return cost if isinstance(cost, int) and 0 <= cost <= _MAX_INT64 else None
    return None


async def add_memo_cost(metadata: llm_pb2.ResultMetadata, execution: WorkflowExecution) -> None:
    """Write what a job costs that Temporal ended before its workflow could, if its model had a price."""
    with suppress(ValueError):
        price = from_memo(await execution.memo_value(names.MEMO_PRICE, None), llm_pb2.ModelPrice)
        if price is not None:
            add_cost(metadata, internal_pb2.JobOptions(price=price))


def _texts(value: object) -> dict[str, str]:
    """Return the texts by name that a memo's value holds. A workflow that was started by hand may hold anything."""
    return {name: text for name, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}


async def base_status(execution: WorkflowExecution) -> llm_pb2.JobStatus:
    """Return the status that a description or a listing of a workflow holds without its activities.

    The state of an open job is RUNNING: neither holds whether a worker has the job.
    """
    final = await final_status(execution)
    if final is not None:
        return final
    status = bare_status(execution)
    status.trace_id = ids.trace_id(await traceparent_of(execution))
    await set_times(status, execution)
    return status


def bare_status(execution: WorkflowExecution) -> llm_pb2.JobStatus:
    """Return the status that a description or a listing holds next to the memo, which may be encrypted."""
    state = (
        llm_pb2.JOB_STATE_RUNNING
        if execution.status is None
        else CLOSED_STATES.get(execution.status, llm_pb2.JOB_STATE_RUNNING)
    )
    outcome = execution.typed_search_attributes.get(names.JOB_STATE)
    if state == llm_pb2.JOB_STATE_FAILED and outcome == "JOB_STATE_TIMED_OUT":
        state = llm_pb2.JOB_STATE_TIMED_OUT
    status = llm_pb2.JobStatus(workflow_id=execution.id, run_id=execution.run_id, state=state)
    status.job_class = job_class_of(execution)
    _set_times_of_temporal(status, execution)
    return status


async def final_status(execution: WorkflowExecution) -> llm_pb2.JobStatus | None:
    """Return the status that the workflow wrote as it closed; None while it is open, or when it wrote none."""
    if execution.status in (None, WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.TERMINATED):
        return None
    try:
        status = from_memo(await execution.memo_value(names.MEMO_STATUS, None), llm_pb2.JobStatus)
    except ValueError as error:
        # A workflow that was started by hand may hold anything.
        _log.info("the memo of %s has a status that %s", execution.id, error)
        return None
    if status is not None:
        status.job_class = job_class_of(execution)
    return status


async def set_times(status: llm_pb2.JobStatus, execution: WorkflowExecution) -> None:
    """Write into the status when the job was accepted and, unless it is set already, when it ended."""
    _set_times_of_temporal(status, execution)
    accepted = time_from_memo(await execution.memo_value(names.MEMO_CREATE_TIME, None))
    # Without one, an earlier version, or no gateway, has started it.
    if accepted is not None:
        status.create_time.CopyFrom(accepted)


def _set_times_of_temporal(status: llm_pb2.JobStatus, execution: WorkflowExecution) -> None:
    status.create_time.FromDatetime(execution.start_time)
    if execution.close_time is not None and not status.HasField("end_time"):
        status.end_time.FromDatetime(execution.close_time)
