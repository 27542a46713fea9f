"""Updates of workflows, with the errors of an RPC."""

import asyncio
from typing import Any

from temporalio.client import WorkflowHandle, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.service import RPCError, RPCStatusCode

from runtime.temporal import RPC_TIMEOUT


async def execute_update(
    handle: WorkflowHandle[Any, Any],
    name: str,
    *arguments: Any,
    update_id: str | None = None,
    result_type: type | None = None,
) -> Any:
    """Update a workflow and return the update's result.

    Raises RPCError: NOT_FOUND for a workflow that has ended, too, DEADLINE_EXCEEDED for one that does not answer in
    time; WorkflowUpdateFailedError.
    """
    try:
        return await handle.execute_update(
            name, args=arguments, id=update_id, result_type=result_type, rpc_timeout=RPC_TIMEOUT
        )
    except WorkflowUpdateRPCTimeoutOrCancelledError as error:
        # The client takes the cancel of its caller for an error of the call, too.
        if not isinstance(error.__cause__, RPCError):
            raise asyncio.CancelledError from error
        message = "Temporal has not answered an update in time"
        raise RPCError(message, RPCStatusCode.DEADLINE_EXCEEDED, b"") from error
