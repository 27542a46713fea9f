"""How a job's deliveries stand: what the workflows that make them say.

While the job is open its own workflow knows; afterwards its LLMDeliveryWorkflow, if there ever was one.
"""

import logging
from typing import Final, NamedTuple

from temporalio.client import Client, WorkflowExecution, WorkflowQueryFailedError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.events import notification
from jobs.ids import delivery_workflow_id, unshortened_delivery_workflow_id
from llm_pb import llm_pb2
from runtime.temporal import RPC_TIMEOUT
from services.gateway.errors import not_found

_log = logging.getLogger(__name__)
_NO_ANSWER: Final = (
    RPCStatusCode.NOT_FOUND,
    # The id is longer than the server takes.
    RPCStatusCode.INVALID_ARGUMENT,
    # It ended before its first step.
    RPCStatusCode.FAILED_PRECONDITION,
)
_SETTLED: Final = (llm_pb2.NOTIFY_STATE_DELIVERED, llm_pb2.NOTIFY_STATE_SKIPPED)


class Standing(NamedTuple):
    """How a job's deliveries stand."""

    state: llm_pb2.DeliveryState
    delivery_workflow_id: str
    """The id of the LLMDeliveryWorkflow that goes on with them, whether it has ever been started or not."""


class DeliveryReader:
    """Reads from Temporal how the deliveries of jobs stand."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def refresh(self, status: llm_pb2.JobStatus) -> None:
        """Bring the notifications of an ended job's status up to date. Raises RPCError when Temporal is away."""
        if all(shown.state in _SETTLED for shown in status.notifications):
            return
        later = await self._later(status.workflow_id, status.run_id)
        if later is not None:
            del status.notifications[:]
            status.notifications.extend(map(notification, later.state.deliveries))

    async def standing(self, workflow_id: str, job: WorkflowExecution | None) -> Standing:
        """Return how a job's deliveries stand; `job` is None when the job's own record is gone.

        Raises ApiError NOT_FOUND, RPCError when Temporal is away.
        """
        later = await self._later(workflow_id, job.run_id if job else None)
        if later is not None:
            return later
        state = await self._ask(job) if job is not None else None
        if state is None:
            raise not_found(workflow_id)
        return Standing(state, delivery_workflow_id(workflow_id))

    async def _later(self, workflow_id: str, run_id: str | None) -> Standing | None:
        """Return how the deliveries stood after the job had closed, None when it left none.

        They may outlive the record of their job, whose id may by then belong to another one: `run_id` says which job is
        meant, None the one whose record is gone.
        """
        # An earlier version did not shorten the id.
        for id_ in dict.fromkeys((delivery_workflow_id(workflow_id), unshortened_delivery_workflow_id(workflow_id))):
            state = await self._left(id_)
            if state is None or state.event.status.workflow_id != workflow_id:
                continue
            if run_id in (None, state.event.status.run_id):
                return Standing(state, id_)
        return None

    async def _left(self, id_: str) -> llm_pb2.DeliveryState | None:
        """Return what the LLMDeliveryWorkflow of this id says, None when there is none."""
        try:
            execution = await self._client.get_workflow_handle(id_).describe(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status in _NO_ANSWER:
                return None
            raise
        if execution.workflow_type != names.DELIVERY_WORKFLOW_TYPE:
            return None
        return await self._ask(execution)

    async def _ask(self, execution: WorkflowExecution) -> llm_pb2.DeliveryState | None:
        """Return what the workflow itself says, None when it cannot."""
        handle = self._client.get_workflow_handle(execution.id, run_id=execution.run_id)
        try:
            state: llm_pb2.DeliveryState = await handle.query(
                names.QUERY_GET_DELIVERIES, result_type=llm_pb2.DeliveryState, rpc_timeout=RPC_TIMEOUT
            )
        except RPCError as error:
            if error.status in _NO_ANSWER:
                return None
            raise
        except WorkflowQueryFailedError as error:
            _log.warning("%s does not say how its deliveries stand: %s", execution.id, error)
            return None
        return state
