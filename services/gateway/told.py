"""What open pipelines tell of themselves."""

from typing import NamedTuple

from temporalio.client import Client, WorkflowExecution, WorkflowExecutionStatus, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from llm_pb import internal_pb2
from runtime.shared_calls import SharedCalls
from services.gateway.updates import execute_update


class Told(NamedTuple):
    """What a pipeline has told."""

    record: internal_pb2.PipelineRecord
    deliveries: internal_pb2.DeliveryState


class Telling:
    """Asks pipelines by the update Tell, which they refuse with what they tell.

    Temporal takes ten updates of a workflow at once, so one of each pipeline is in flight, and calls of the same time
    share it.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._calls = SharedCalls()

    async def ask(self, execution: WorkflowExecution) -> Told | None:
        """Return what an open pipeline tells, which nobody may change; None for one that is to be asked by a query.

        That is one that has ended, or whose code is older than the update. Raises RPCError: FAILED_PRECONDITION while
        its present task fails, DEADLINE_EXCEEDED if no worker runs it in time.
        """
        if execution.status != WorkflowExecutionStatus.RUNNING:
            return None
        return await self._calls.fresh((execution.id, execution.run_id), lambda: self._ask(execution))

    async def _ask(self, execution: WorkflowExecution) -> Told | None:
        try:
            await execute_update(
                self._client.get_workflow_handle(execution.id, run_id=execution.run_id), names.UPDATE_TELL
            )
        except WorkflowUpdateFailedError as error:
            if isinstance(error.cause, ApplicationError) and error.cause.type == names.TOLD:
                return Told(*error.cause.details)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
        return None
