"""The workflows of batches and pipelines: those that a caller may see, and the records that they answer with."""

from contextlib import suppress
from typing import Any, Final, TypeVar

from google.protobuf.message import Message
from temporalio.api.enums.v1 import EventType, WorkflowTaskFailedCause
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowHandle, WorkflowQueryFailedError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.ids import tenant_of
from llm_pb import internal_pb2
from pipelines.errors import PipelineNotHere
from runtime.auth import Caller
from runtime.temporal import RPC_TIMEOUT
from services.gateway.errors import ApiError, temporal_unavailable
from services.gateway.job_record import user_of
from services.gateway.runs import Runs

Answer = TypeVar("Answer", bound=Message)
Record = TypeVar("Record", internal_pb2.BatchRecord, internal_pb2.PipelineRecord)
_QUERIES: Final = 5
"""Maximum number of gateways that are asked for one answer."""
_FAILED: Final = EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED
_MAX_EVENTS_OF_START: Final = 100
"""Maximum number of events that are read of a workflow whose first task is not done. One with more does not answer."""


async def describe_own(runs: Runs, caller: Caller, id_: str, workflow_type: str) -> WorkflowExecutionDescription | None:
    """Return Temporal's description of a workflow of the type that the caller may see; None without one.

    Raises RPCError, KeysUnavailable.
    """
    # Temporal is not asked about an id of another tenant.
    found = await runs.describe(id_) if tenant_of(id_) == caller.tenant else None
    if found is None or found.workflow_type != workflow_type:
        return None
    if caller.user_id and not caller.may_see(await user_of(found)):
        return None
    return found


async def query_record(
    client: Client, description: WorkflowExecutionDescription, record_type: type[Record], what: str
) -> Record | None:
    """Return the record of a workflow; None while its present task fails, or while the first one is not done.

    `what` names the work in an error. Raises ApiError UNAVAILABLE and RPCError when Temporal or the workflow worker
    does not answer.
    """
    handle = client.get_workflow_handle(description.id, run_id=description.run_id)
    try:
        record = await query_any(handle, names.QUERY_GET_RECORD, record_type)
    except WorkflowQueryFailedError as error:
        raise no_answer(what) from error
    except RPCError as error:
        if error.status != RPCStatusCode.FAILED_PRECONDITION:
            raise
        return None
    return record


async def query_any(handle: WorkflowHandle[Any, Any], query: str, answer_type: type[Answer]) -> Answer:
    """Return the answer to a query. Raises WorkflowQueryFailedError, RPCError.

    Temporal gives a query to any gateway. One that does not have the code of a pipeline, or has another version of it,
    fails it, and the next one may have it.
    """
    for _ in range(_QUERIES - 1):
        with suppress(WorkflowQueryFailedError):
            return await _query(handle, query, answer_type)
    return await _query(handle, query, answer_type)


async def _query(handle: WorkflowHandle[Any, Any], query: str, answer_type: type[Answer]) -> Answer:
    answer: Answer = await handle.query(query, result_type=answer_type, rpc_timeout=RPC_TIMEOUT)
    return answer


def no_answer(what: str) -> ApiError:
    """Return the error for work whose workflow does not answer."""
    return temporal_unavailable(f"the {what} does not answer; call again")


async def events_of_start(client: Client, description: WorkflowExecutionDescription) -> list[HistoryEvent]:
    """Return the events of a workflow whose code had not run yet when it was described; none if it had.

    They are its start, its first task, and what has come meanwhile, such as a cancel. Raises RPCError.
    """
    events: list[HistoryEvent] = []
    if description.raw_description.workflow_execution_info.first_run_id != description.run_id:
        return events
    handle = client.get_workflow_handle(description.id, run_id=description.run_id)
    async for event in handle.fetch_history_events(page_size=_MAX_EVENTS_OF_START, rpc_timeout=RPC_TIMEOUT):
        if _tells_of_code(event) or len(events) == _MAX_EVENTS_OF_START:
            return []
        events.append(event)
        # What has happened since does not tell why it has not answered.
        if len(events) == description.history_length:
            break
    return events


def _tells_of_code(event: HistoryEvent) -> bool:
    """Return whether the code has run, or has failed.

    It has not where a workflow was terminated during the task, nor at a gateway that does not have the pipeline.
    """
    if event.event_type == _FAILED:
        failed = event.workflow_task_failed_event_attributes
        is_here = failed.failure.application_failure_info.type != PipelineNotHere.__name__
        return is_here and failed.cause != WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_FORCE_CLOSE_COMMAND
    return event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
