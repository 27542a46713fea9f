"""ListBatches: finds the batches of a page in Temporal's visibility, and returns their status as GetBatch does."""

import asyncio
import logging
from typing import Final

from temporalio.client import Client, WorkflowExecution, WorkflowExecutionStatus
from temporalio.service import RPCError

from encryption import Encryption, KeysUnavailable
from jobs import names
from llm_pb import batch_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from services.gateway.batches.reader import BatchReader, bare_status, ended_record
from services.gateway.errors import ApiError
from services.gateway.page_token import PageTokens
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings
from services.gateway.visibility import DEFAULT_PAGE_SIZE, own_page, terms_of

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
        self._client = client
        self._reader = reader
        self._page_tokens = page_tokens
        self._timeout = settings.list_timeout
        self._encryption = encryption
        self._knows_tenants = knows_tenants
        self._describes = asyncio.Semaphore(_DESCRIBES)

    async def list_page(self, caller: Caller, request: batch_pb2.ListBatchesRequest) -> batch_pb2.ListBatchesResponse:
        """Return a page of the batches of the caller's tenant.

        Raises ApiError INVALID_ARGUMENT for a page_token that Temporal refuses, UNAVAILABLE when it does not answer in
        time; RPCError, KeysUnavailable.
        """
        until = asyncio.get_running_loop().time() + self._timeout.total_seconds()
        page = self._client.list_workflows(
            await self._query(caller.tenant, request),
            page_size=request.page_size or DEFAULT_PAGE_SIZE,
            next_page_token=self._page_tokens.unseal(caller.tenant, request),
        )
        own, following = await own_page(page, caller, request, self._page_tokens, self._timeout / 2, "batches")
        found = await asyncio.gather(*(self._status(item, until) for item in own))
        shown = [status for status in found if not request.states or status.state in request.states]
        return batch_pb2.ListBatchesResponse(batches=shown, next_page_token=following)

    async def _status(self, execution: WorkflowExecution, until: float) -> batch_pb2.BatchStatus:
        status = batch_pb2.BatchStatus()
        try:
            if (record := await ended_record(execution)) is not None:
                status.CopyFrom(record.status)
            else:
                async with asyncio.timeout_at(until), self._describes:
                    status.CopyFrom(await self._reader.status(gateway_for(execution.id), execution.id))
        except (PayloadError, KeysUnavailable) as error:
            _log.info("%s cannot be decrypted: %s", execution.id, error)
            status = _unreadable(execution)
        except (ApiError, RPCError, TimeoutError) as error:
            # The page must not fail.
            _log.info("%s cannot be described: %r", execution.id, error)
            status = await bare_status(execution)
        status.ClearField("notifications")
        return status

    async def _query(self, tenant: str, request: batch_pb2.ListBatchesRequest) -> str:
        """Return the visibility query: see terms_of."""
        filters, hash_ = {names.USER_ID: request.user_id, names.PROJECT_ID: request.project_id}, None
        if self._encryption is not None and any(filters.values()):
            hash_ = await self._encryption.known_search_hash(tenant)
        terms = [f"WorkflowType = '{names.BATCH_WORKFLOW_TYPE}'", "ExecutionStatus != 'ContinuedAsNew'"]
        terms += terms_of(tenant, filters, hash_, knows_tenants=self._knows_tenants)
        if request.states:
            terms.append(f"({' OR '.join(sorted(map(_of_state, set(request.states))))})")
        return " AND ".join(terms)


def _of_state(state: "batch_pb2.BatchState.ValueType") -> str:
    if state in _OPEN:
        return "ExecutionStatus = 'Running'"
    # One that an operator has ended has left no state.
    unknown = f"({names.JOB_STATE.name} IS NULL AND ExecutionStatus != 'Running')"
    return f"({names.JOB_STATE.name} = '{batch_pb2.BatchState.Name(state)}' OR {unknown})"


def _unreadable(execution: WorkflowExecution) -> batch_pb2.BatchStatus:
    status = batch_pb2.BatchStatus(batch_id=execution.id, state=batch_pb2.BATCH_STATE_RUNNING)
    if execution.status != WorkflowExecutionStatus.RUNNING:
        status.state = batch_pb2.BATCH_STATE_FAILED
    status.create_time.FromDatetime(execution.start_time)
    return status
