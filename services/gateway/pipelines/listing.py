"""ListPipelines: finds the pipelines of a page, and returns their status as GetPipeline does."""

import asyncio
import logging
from typing import Final

from temporalio.client import Client, WorkflowExecution
from temporalio.service import RPCError

from encryption import Encryption, KeysUnavailable
from jobs import names
from jobs.ids import is_below
from jobs.pipelines import FINAL_STATES
from llm_pb import pipeline_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from services.gateway.errors import ApiError
from services.gateway.page_token import PageTokens
from services.gateway.pipelines.catalogue import goes_on
from services.gateway.pipelines.reader import PipelineReader, bare_status, closed_status
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings
from services.gateway.work_listing import WorkListing

_log = logging.getLogger(__name__)
_QUERIES: Final = 8


class PipelineListing:
    """Lists pipelines."""

    def __init__(
        self,
        client: Client,
        reader: PipelineReader,
        page_tokens: PageTokens,
        settings: GatewaySettings,
        encryption: Encryption | None,
        *,
        knows_tenants: bool,
    ) -> None:
        """`knows_tenants`: whether the namespace has the search attribute TenantId."""
        self._reader = reader
        self._pages = WorkListing(
            client, page_tokens, settings, encryption, names.PIPELINE_WORKFLOW_TYPE, knows_tenants=knows_tenants
        )
        self._timeout = settings.list_timeout.total_seconds()
        self._queries = asyncio.Semaphore(_QUERIES)

    async def list_page(
        self, caller: Caller, request: pipeline_pb2.ListPipelinesRequest
    ) -> pipeline_pb2.ListPipelinesResponse:
        """Return a page of the pipelines of the caller's tenant. Raises like WorkListing.page()."""
        until = asyncio.get_running_loop().time() + self._timeout
        own, next_page_token = await self._pages.page(caller.tenant, request)
        found = await asyncio.gather(*(self._status(item, until) for item in own))
        pipelines = [status for status in found if status is not None]
        return pipeline_pb2.ListPipelinesResponse(pipelines=pipelines, next_page_token=next_page_token)

    async def _status(self, execution: WorkflowExecution, until: float) -> pipeline_pb2.PipelineStatus | None:
        """Return the status of a pipeline; None for an earlier run of one that has gone on."""
        known = bare_status(execution)
        try:
            status = await closed_status(execution)
            if status.state in FINAL_STATES:
                known = status
                # One that an operator has ended does not tell its name.
                if status.name and not goes_on(status) and not is_below(execution.id):
                    return status
            async with asyncio.timeout_at(until), self._queries:
                if known is status:
                    return None if await self._reader.has_gone_on(execution) else status
                return (await self._reader.read(gateway_for(execution.id), execution.id)).status
        except (PayloadError, KeysUnavailable, ApiError, RPCError, TimeoutError) as error:
            # The page must not fail.
            _log.info("%s cannot be read: %r", execution.id, error)
            return known
