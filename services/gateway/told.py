"""What open pipelines tell of themselves."""

import asyncio
import logging
import uuid
from typing import Final, NamedTuple

from temporalio.client import Client, WorkflowExecution, WorkflowExecutionStatus, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from llm_pb import internal_pb2
from runtime.shared_calls import SharedCalls
from runtime.temporal import RPC_TIMEOUT
from services.gateway.own_work import no_answer
from services.gateway.updates import execute_update

_log = logging.getLogger(__name__)
_UNKNOWN: Final = "RuntimeError"
"""The type of the error by which the SDK refuses an update that the code of a workflow does not have."""


class Told(NamedTuple):
    """What a pipeline has told."""

    record: internal_pb2.PipelineRecord
    deliveries: internal_pb2.DeliveryState


class Telling:
    """Asks pipelines by the update Tell, which they refuse with what they tell.

    Temporal takes ten updates of a workflow at once, and keeps one whose caller has gone until a worker takes it. So
    all that ask a pipeline by this share one update for each part of its record.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._calls = SharedCalls()
        self._update_id = f"tell-{uuid.uuid4().hex}"

    async def ask(self, execution: WorkflowExecution) -> Told | None:
        """Return what an open pipeline tells, which nobody may change; None for one that is to be asked by a query.

        That is one that has ended, or whose code is older than the update. Raises RPCError: FAILED_PRECONDITION while
        its present task fails, DEADLINE_EXCEEDED if no worker runs it in time, RESOURCE_EXHAUSTED if it has too many
        updates; ApiError UNAVAILABLE.
        """
        if execution.status != WorkflowExecutionStatus.RUNNING:
            return None
        return await self._calls.fresh((execution.id, execution.run_id), lambda: self._ask(execution))

    async def _ask(self, execution: WorkflowExecution) -> Told | None:
        """Return all parts as one, in the time of one call."""
        try:
            async with asyncio.timeout(RPC_TIMEOUT.total_seconds()):
                return await self._parts(execution)
        except TimeoutError as error:
            message = "the pipeline has not told all of its tree in time"
            raise RPCError(message, RPCStatusCode.DEADLINE_EXCEEDED, b"") from error

    async def _parts(self, execution: WorkflowExecution) -> Told | None:
        """Return all parts as one. The version is that of the first: a node of a later part may have changed since."""
        told = await self._part(execution, 0)
        while told is not None and len(told.record.nodes) < told.record.node_count:
            part = await self._part(execution, len(told.record.nodes))
            if part is None:
                return None
            if not part.record.nodes or part.record.version < told.record.version:
                # A crash has undone what an earlier part shows.
                raise no_answer("pipeline")
            told.record.nodes.extend(part.record.nodes)
        if told is not None:
            told.record.node_count = 0
        return told

    async def _part(self, execution: WorkflowExecution, first: int) -> Told | None:
        request = [internal_pb2.TellRequest(first_node=first)] if first else []
        # Temporal takes an update of the same id for this one, and may still have that of another part.
        update_id = f"{self._update_id}-{first}"
        handle = self._client.get_workflow_handle(execution.id, run_id=execution.run_id)
        try:
            await execute_update(handle, names.UPDATE_TELL, *request, update_id=update_id)
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            if isinstance(cause, ApplicationError) and cause.type == names.TOLD:
                return Told(*cause.details[:2])
            if not isinstance(cause, ApplicationError) or cause.type != _UNKNOWN:
                _log.warning("%s does not tell its record: %s", execution.id, cause)
                raise no_answer("pipeline") from error
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
        return None
