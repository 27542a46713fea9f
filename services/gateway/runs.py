"""The runs of workflows in Temporal."""

import asyncio
import logging
from collections.abc import Collection, Iterable
from typing import Any, Final

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowHandle
from temporalio.client import WorkflowExecution as ListedExecution
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from payload_converter import PayloadError
from runtime.temporal import RPC_TIMEOUT

_log = logging.getLogger(__name__)
_SECOND_TRY_SECONDS: Final = 0.1
"""Pause before Temporal is asked once more about a workflow that it did not know."""
_UNKNOWN: Final = (
    RPCStatusCode.NOT_FOUND,
    # The id is longer than the server accepts.
    RPCStatusCode.INVALID_ARGUMENT,
)


async def describe_twice(handle: WorkflowHandle[Any, Any]) -> WorkflowExecutionDescription:
    """Describe a workflow. Ask a second time before it counts as unknown. Raises RPCError.

    Temporal has been seen to answer NOT_FOUND for a workflow that it had just started, under hundreds of concurrent
    starts: it treats a query that its database gave up like one that found nothing.
    """
    try:
        return await handle.describe(rpc_timeout=RPC_TIMEOUT)
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        _log.info("Temporal does not know %s: %s", handle.id, error)
    await asyncio.sleep(_SECOND_TRY_SECONDS)
    return await handle.describe(rpc_timeout=RPC_TIMEOUT)


class Runs:
    """The runs of workflows, of all that had the same id."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def describe(self, id_: str, run_id: str | None = None) -> WorkflowExecutionDescription | None:
        """Return a run, the last one unless one is named; None when Temporal does not have it. Raises RPCError."""
        try:
            return await describe_twice(self._client.get_workflow_handle(id_, run_id=run_id))
        except RPCError as error:
            if error.status in _UNKNOWN:
                return None
            raise

    async def has_gone_on(self, execution: ListedExecution) -> bool:
        """Return whether a later run has the id of a workflow, or a deletion keeps it. Raises RPCError."""
        last = await self.describe(execution.id)
        return last is not None and last.run_id != execution.run_id

    async def was_deleted(self, id_: str) -> bool:
        """Return whether a deletion keeps the id. Raises RPCError."""
        found = await self.describe(id_)
        return found is not None and found.workflow_type == names.TOMBSTONE_WORKFLOW_TYPE

    async def last(self, id_: str, *kinds: str) -> WorkflowExecutionDescription | None:
        """Return the last run under an id; None when Temporal neither has one nor lists one of the types.

        This is for decisions that cannot be taken back. Raises RPCError, and ApplicationError while Temporal lists a
        run that it does not have: the list is updated late, or Temporal is at fault.
        """
        last = await self.describe(id_)
        if last is None and await self.listed(id_, *kinds):
            raise ApplicationError(f"Temporal lists a run of {id_}, and does not have it now")
        return last

    async def like(self, last: WorkflowExecutionDescription) -> set[str]:
        """Return the run ids of the workflows that had the id and the type of this last run. Raises RPCError.

        Temporal's visibility is asked only where there may be more than one run: it takes few requests.
        """
        if await _is_only_run(last):
            return {last.run_id}
        return {last.run_id, *await self.listed(last.id, last.workflow_type)}

    async def delete(self, id_: str, kinds: Collection[str], known: Iterable[str] = ()) -> bool:
        """Delete the last run under an id if it has one of the types, and the `known` ones.

        Return whether none is left. Raises RPCError. Temporal deletes some time after it was asked.
        """
        last = await self.describe(id_)
        found = {last.run_id} if last is not None and last.workflow_type in kinds else set()
        gone = True
        for run_id in {*known, *found}:
            if await self.describe(id_, run_id) is None:
                continue
            gone = False
            execution = WorkflowExecution(workflow_id=id_, run_id=run_id)
            request = DeleteWorkflowExecutionRequest(namespace=self._client.namespace, workflow_execution=execution)
            try:
                await self._client.workflow_service.delete_workflow_execution(request, timeout=RPC_TIMEOUT)
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:
                    raise
        return gone

    async def listed(self, id_: str, *kinds: str) -> set[str]:
        """Return the ids of the runs under an id, of some types, that Temporal's visibility shows. Raises RPCError."""
        # Every id has passed a rule that forbids quotes.
        listed = self._client.list_workflows(f"WorkflowId = '{id_}'", rpc_timeout=RPC_TIMEOUT)
        return {item.run_id async for item in listed if item.workflow_type in kinds}


async def _is_only_run(last: WorkflowExecutionDescription) -> bool:
    """Return whether no other run had the id.

    A gateway starts a job or a batch once, and never under an id that had one, unless it is a step of a pipeline that
    goes on. A pipeline may go on itself.
    """
    if last.workflow_type == names.PIPELINE_WORKFLOW_TYPE:
        return False
    first_run_id = last.raw_description.workflow_execution_info.first_run_id
    try:
        by_gateway = await last.memo_value(names.MEMO_OPTIONS, None) is not None
        by_gateway = by_gateway and await last.memo_value(names.MEMO_RERUN, None) is None
    except PayloadError:
        # The keys of the memo were deleted, so it does not tell.
        return False
    return by_gateway and first_run_id == last.run_id
