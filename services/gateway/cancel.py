"""Cancel: signals the job's workflow."""

import logging

from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from llm_pb import llm_pb2
from runtime.auth import Caller
from services.gateway.effects import Effects
from services.gateway.job_reader import JobReader
from services.gateway.job_record import FINAL_STATES
from services.gateway.job_traces import link_call

_log = logging.getLogger(__name__)


class JobCancellation:
    """Cancels jobs."""

    def __init__(self, effects: Effects, reader: JobReader) -> None:
        self._effects = effects
        self._reader = reader

    async def cancel(self, caller: Caller, request: llm_pb2.CancelRequest) -> llm_pb2.CancelResponse:
        """Cancel the job and return its status; an ended job does not change. Raises ApiError NOT_FOUND, RPCError."""
        description = await self._reader.describe(caller, request.workflow_id)
        await link_call(description)
        if description.status != WorkflowExecutionStatus.RUNNING:
            return llm_pb2.CancelResponse(status=await self._reader.readable_status(description))
        signalled = True
        try:
            await self._effects.signal(request.workflow_id, names.SIGNAL_CANCEL, request)
        except RPCError as error:
            # Temporal answers NOT_FOUND for a workflow that has ended, too, and sometimes wrongly: see describe_twice.
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            signalled = False
        _log.info("cancel asked for", extra={"workflow_id": request.workflow_id})
        status = await self._reader.readable_status(await self._reader.describe(caller, request.workflow_id))
        if status.state not in FINAL_STATES:
            if not signalled:
                await self._effects.signal(request.workflow_id, names.SIGNAL_CANCEL, request)
            status.cancel_requested = True
        return llm_pb2.CancelResponse(status=status)
