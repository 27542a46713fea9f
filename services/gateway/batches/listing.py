"""ListBatches: finds the batches of a page in Temporal's visibility, and returns their status as GetBatch does."""

import asyncio
import logging
from typing import Final

from temporalio.client import Client, WorkflowExecution, WorkflowExecutionStatus
from temporalio.service import RPCError

from encryption import Encryption, KeysUnavailable
from jobs import names
from jobs.ids import is_below
from llm_pb import batch_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from services.gateway.batches.reader import BatchReader, ended_record, unreadable_status
from services.gateway.errors import ApiError
from services.gateway.page_token import PageTokens
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings
from services.gateway.work_listing import WorkListing

_log = logging.getLogger(__name__)
_DESCRIBES: Final = 8
_OPEN: Final = frozenset(
    {batch_pb2.BATCH_STATE_VALIDATING, batch_pb2.BATCH_STATE_RUNNING, batch_pb2.BATCH_STATE_FINALIZING}
)


class BatchListing:
    """Lists batches."""

    def __init__(
        self,
        client: Client,
        reader: BatchReader,
        page_tokens: PageTokens,
        settings: GatewaySettings,
        encryption: Encryption | None,
        *,
        knows_tenants: bool,
    ) -> None:
        """`knows_tenants`: whether the namespace has the search attribute TenantId."""
        self._reader = reader
        self._pages = WorkListing(
            client, page_tokens, settings, encryption, names.BATCH_WORKFLOW_TYPE, knows_tenants=knows_tenants
        )
        self._timeout = settings.list_timeout.total_seconds()
        self._describes = asyncio.Semaphore(_DESCRIBES)

    async def list_page(self, caller: Caller, request: batch_pb2.ListBatchesRequest) -> batch_pb2.ListBatchesResponse:
        """Return a page of the batches of the caller's tenant. Raises like WorkListing.page()."""
        until = asyncio.get_running_loop().time() + self._timeout
        terms = [f"({' OR '.join(sorted(map(_of_state, set(request.states))))})"] if request.states else []
        own, next_page_token = await self._pages.page(caller.tenant, request, terms)
        found = await asyncio.gather(*(self._status(item, until) for item in own))
        known = [status for status in found if status is not None]
        shown = [status for status in known if not request.states or status.state in request.states]
        return batch_pb2.ListBatchesResponse(batches=shown, next_page_token=next_page_token)

    async def _status(self, execution: WorkflowExecution, until: float) -> batch_pb2.BatchStatus | None:
        """Return the status of a batch; None for an earlier run of one that has run again."""
        status = batch_pb2.BatchStatus()
        try:
            if await self._has_gone_on(execution, until):
                return None
            if (record := await ended_record(execution)) is not None:
                status.CopyFrom(record.status)
            else:
                async with asyncio.timeout_at(until), self._describes:
                    status.CopyFrom(await self._reader.status(gateway_for(execution.id), execution.id))
        except (PayloadError, KeysUnavailable) as error:
            _log.info("%s cannot be decrypted: %s", execution.id, error)
            status = unreadable_status(execution)
        except (ApiError, RPCError, TimeoutError) as error:
            # The page must not fail.
            _log.info("%s cannot be described: %r", execution.id, error)
            status = unreadable_status(execution)
        status.ClearField("notifications")
        return status

    async def _has_gone_on(self, execution: WorkflowExecution, until: float) -> bool:
        """Return whether a batch that is a step of a pipeline has run again. An open run is the last one."""
        if execution.status == WorkflowExecutionStatus.RUNNING or not is_below(execution.id):
            return False
        async with asyncio.timeout_at(until), self._describes:
            return await self._reader.has_gone_on(execution)


def _of_state(state: "batch_pb2.BatchState.ValueType") -> str:
    if state in _OPEN:
        return "ExecutionStatus = 'Running'"
    # One that an operator has ended has left no state.
    unknown = f"({names.JOB_STATE.name} IS NULL AND ExecutionStatus != 'Running')"
    return f"({names.JOB_STATE.name} = '{batch_pb2.BatchState.Name(state)}' OR {unknown})"
