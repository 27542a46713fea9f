"""ListDeliveries and Redeliver: how a job's deliveries stand, and sending them again.

While the job is open its own workflow knows; afterwards its LLMDeliveryWorkflow, if there ever was one.
"""

import logging
from collections.abc import Sequence
from typing import Final

from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowQueryFailedError,
)
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.delivery import notification
from jobs.ids import delivery_workflow_id
from jobs.rules import Violation
from llm_pb import llm_pb2
from runtime.temporal import RPC_TIMEOUT
from services.gateway.errors import invalid, job_not_ended, not_found
from services.gateway.job_traces import link_call

_log = logging.getLogger(__name__)
_NO_ANSWER: Final = (
    RPCStatusCode.NOT_FOUND,
    RPCStatusCode.INVALID_ARGUMENT,
    # It ended before its first step.
    RPCStatusCode.FAILED_PRECONDITION,
)
_SETTLED: Final = (llm_pb2.NOTIFY_STATE_DELIVERED, llm_pb2.NOTIFY_STATE_SKIPPED)


class DeliveryReader:
    """Reads from Temporal how the deliveries of jobs stand."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def refresh(self, status: llm_pb2.JobStatus) -> None:
        """Bring the notifications of an ended job's status up to date. Raises RPCError when Temporal is away."""
        if all(shown.state in _SETTLED for shown in status.notifications):
            return
        state = await self._later(status.workflow_id, status.run_id)
        if state is not None:
            del status.notifications[:]
            status.notifications.extend(map(notification, state.deliveries))

    async def state(self, workflow_id: str) -> llm_pb2.DeliveryState:
        """Return how a job's deliveries stand. Raises ApiError NOT_FOUND, RPCError when Temporal is away."""
        own = await self.ask(workflow_id)
        run_id = own.event.status.run_id if own else None
        state = await self._later(workflow_id, run_id) or own
        if state is None:
            raise not_found(workflow_id)
        return state

    async def _later(self, workflow_id: str, run_id: str | None) -> llm_pb2.DeliveryState | None:
        """Return how the deliveries stood after the job had closed, None when it left none.

        They may outlive the record of their job, whose id may by then belong to another one: `run_id` says which job is
        meant, None the one whose record is gone.
        """
        state = await self.ask(delivery_workflow_id(workflow_id))
        return state if state and run_id in (None, state.event.status.run_id) else None

    async def ask(self, workflow_id: str) -> llm_pb2.DeliveryState | None:
        """Return what the workflow answers, None when there is no such workflow or it is none of ours."""
        try:
            state: llm_pb2.DeliveryState = await self._client.get_workflow_handle(workflow_id).query(
                names.QUERY_GET_DELIVERIES, result_type=llm_pb2.DeliveryState, rpc_timeout=RPC_TIMEOUT
            )
        except RPCError as error:
            if error.status in _NO_ANSWER:
                return None
            raise
        except WorkflowQueryFailedError as error:
            _log.warning("%s does not say how its deliveries stand: %s", workflow_id, error)
            return None
        return state


class Deliveries:
    """The two methods of the API."""

    def __init__(self, client: Client, reader: DeliveryReader, workflow_queue: str) -> None:
        self._client = client
        self._reader = reader
        self._workflow_queue = workflow_queue

    async def list_all(self, request: llm_pb2.ListDeliveriesRequest) -> llm_pb2.ListDeliveriesResponse:
        """Return the log. Raises ApiError NOT_FOUND, RPCError."""
        await self._found(request.workflow_id)
        state = await self._reader.state(request.workflow_id)
        return llm_pb2.ListDeliveriesResponse(deliveries=[*state.deliveries, *state.earlier])

    async def redeliver(self, request: llm_pb2.RedeliverRequest) -> llm_pb2.RedeliverResponse:
        """Send again, from where the deliveries stand.

        Raises ApiError NOT_FOUND, FAILED_PRECONDITION, INVALID_ARGUMENT for an id of no delivery; RPCError.
        """
        description = await self._found(request.workflow_id)
        if description is not None and description.status == WorkflowExecutionStatus.RUNNING:
            raise job_not_ended(request.workflow_id)
        state = await self._reader.state(request.workflow_id)
        chosen = _choose(state.deliveries, request.delivery_ids)
        await self._client.start_workflow(
            names.DELIVERY_WORKFLOW_TYPE,
            state,
            id=delivery_workflow_id(request.workflow_id),
            task_queue=self._workflow_queue,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            start_signal=names.SIGNAL_REDELIVER,
            start_signal_args=[request],
            rpc_timeout=RPC_TIMEOUT,
        )
        return llm_pb2.RedeliverResponse(deliveries=chosen)

    async def _found(self, workflow_id: str) -> WorkflowExecutionDescription | None:
        """Return the job, with the call linked to its trace; None when it is past its retention or never was."""
        try:
            description = await self._client.get_workflow_handle(workflow_id).describe(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            # Its deliveries may be known even so.
            if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                return None
            raise
        await link_call(description)
        return description


def _choose(deliveries: Sequence[llm_pb2.Delivery], ids: Sequence[str]) -> list[llm_pb2.Delivery]:
    known = {delivery.id for delivery in deliveries}
    violations = [
        Violation(f"delivery_ids[{index}]", "is no delivery of the job's outcome: see ListDeliveries")
        for index, id_ in enumerate(ids)
        if id_ not in known
    ]
    if not deliveries:
        violations = [Violation("workflow_id", "names a job whose outcome was to be told to nobody")]
    if violations:
        raise invalid(violations)
    return [delivery for delivery in deliveries if not ids or delivery.id in ids]
