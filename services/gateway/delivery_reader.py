"""Reads the state of the deliveries of a job or batch from the workflows that make them.

While the job is open its own workflow knows the state. Afterwards its LLMDeliveryWorkflow does, if there ever was one.
"""

import logging
from collections.abc import MutableSequence
from functools import partial
from typing import Final, NamedTuple

from temporalio.client import (
    Client,
    WorkflowExecution,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowQueryFailedError,
)
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.events import notification
from jobs.ids import delivery_workflow_id, delivery_workflow_ids
from llm_pb import internal_pb2, llm_pb2
from runtime.shared_calls import SharedCalls
from services.gateway.errors import not_found
from services.gateway.own_work import events_of_start, no_answer, query_any
from services.gateway.runs import describe_twice
from services.gateway.told import Telling

_log = logging.getLogger(__name__)
_NO_ANSWER: Final = (
    RPCStatusCode.NOT_FOUND,
    # The id is longer than the server accepts.
    RPCStatusCode.INVALID_ARGUMENT,
    # The workflow ended before its first step, or its present task fails.
    RPCStatusCode.FAILED_PRECONDITION,
)
_SETTLED: Final = (llm_pb2.NOTIFY_STATE_DELIVERED, llm_pb2.NOTIFY_STATE_SKIPPED)


class Standing(NamedTuple):
    """The state of a job's deliveries, and the workflow that continues them."""

    state: internal_pb2.DeliveryState
    delivery_workflow_id: str
    """The id of the LLMDeliveryWorkflow that continues them, whether it was ever started or not."""
    open: bool
    """Whether that workflow was open before the state was read. The state may have changed since."""


class DeliveryReader:
    """Reads the state of deliveries from Temporal. Concurrent calls share it, so it must not be changed."""

    def __init__(self, client: Client, telling: Telling) -> None:
        self._client = client
        self._telling = telling
        self._shared = SharedCalls()

    async def refresh(
        self, workflow_id: str, run_id: str, notifications: MutableSequence[llm_pb2.NotifyStatus]
    ) -> None:
        """Update the notifications of an ended job or batch. Raises RPCError when Temporal is unavailable."""
        if all(shown.state in _SETTLED for shown in notifications):
            return
        later = await self._later(workflow_id, run_id)
        if later is not None:
            del notifications[:]
            notifications.extend(map(notification, later.state.deliveries))

    async def standing(self, workflow_id: str, job: WorkflowExecutionDescription | None) -> Standing:
        """Return the state of a job's deliveries; `job` is None when the job's own record is gone.

        Raises ApiError NOT_FOUND, and UNAVAILABLE for work that does not answer; RPCError when Temporal is unavailable,
        PayloadError for a job whose keys were deleted, and KeysUnavailable.
        """
        later = await self._later(workflow_id, job.run_id if job else None)
        if later is not None:
            return later
        if job is None:
            raise not_found(workflow_id)
        try:
            state = await self._shared.fresh((job.id, job.run_id), lambda: self._ask(job))
        except WorkflowQueryFailedError as error:
            _log.warning("%s does not report the state of its deliveries: %s", job.id, error)
            state = None
        if state is None:
            # Every job has it. The job of deleted keys exists, and its workflow cannot answer.
            await job.memo_value(names.MEMO_DIGEST, None)
            is_open = job.status == WorkflowExecutionStatus.RUNNING
            if not is_open and await events_of_start(self._client, job):
                # It was ended before its code ran.
                raise not_found(workflow_id)
            raise no_answer("work")
        return Standing(state, delivery_workflow_id(workflow_id), open=False)

    async def _later(self, workflow_id: str, run_id: str | None) -> Standing | None:
        """Return the state of the deliveries after the job closed, None when it left none.

        Deliveries may outlive the record of their job, and its id may by then belong to another job. `run_id` says
        which job is meant. None means the one whose record is gone.
        """
        for id_ in delivery_workflow_ids(workflow_id):
            standing = await self._shared.fresh(id_, partial(self._left, id_))
            if standing is None or standing.state.event.status.workflow_id != workflow_id:
                continue
            if run_id in (None, standing.state.event.status.run_id):
                return standing
        return None

    async def _left(self, id_: str) -> Standing | None:
        """Return the state that the LLMDeliveryWorkflow of this id reports, None when there is none."""
        try:
            execution = await describe_twice(self._client.get_workflow_handle(id_))
        except RPCError as error:
            if error.status in _NO_ANSWER:
                return None
            raise
        if execution.workflow_type != names.DELIVERY_WORKFLOW_TYPE:
            return None
        try:
            state = await self._ask(execution)
        except WorkflowQueryFailedError as error:
            _log.warning("%s does not report the state of its deliveries: %s", execution.id, error)
            return None
        return state and Standing(state, id_, open=execution.status == WorkflowExecutionStatus.RUNNING)

    async def _ask(self, execution: WorkflowExecution) -> internal_pb2.DeliveryState | None:
        """Return the state that the workflow reports, None when it has none. Raises WorkflowQueryFailedError."""
        handle = self._client.get_workflow_handle(execution.id, run_id=execution.run_id)
        try:
            if execution.workflow_type == names.PIPELINE_WORKFLOW_TYPE:
                told = await self._telling.ask(execution)
                if told is not None:
                    return told.deliveries
            state = await query_any(handle, names.QUERY_GET_DELIVERIES, internal_pb2.DeliveryState)
        except RPCError as error:
            if error.status in _NO_ANSWER:
                return None
            raise
        return state
