"""Pages of a tenant's batches or pipelines, from Temporal's visibility."""

import asyncio
from collections.abc import Iterable
from typing import Final

from temporalio.client import Client, WorkflowExecution
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption
from jobs import names
from jobs.ids import tenant_of
from llm_pb import batch_pb2, pipeline_pb2
from services.gateway.errors import invalid, temporal_unavailable
from services.gateway.page_token import REFUSED, PageTokens
from services.gateway.settings import GatewaySettings

_DEFAULT_PAGE_SIZE: Final = 20


class WorkListing:
    """Finds the workflows of one type that a page shows."""

    def __init__(
        self,
        client: Client,
        page_tokens: PageTokens,
        settings: GatewaySettings,
        encryption: Encryption | None,
        workflow_type: str,
        *,
        knows_tenants: bool,
    ) -> None:
        """`knows_tenants`: whether the namespace has the search attribute TenantId."""
        self._client = client
        self._page_tokens = page_tokens
        self._timeout = settings.list_timeout.total_seconds()
        self._encryption = encryption
        self._workflow_type = workflow_type
        self._knows_tenants = knows_tenants

    async def page(
        self,
        tenant: str,
        request: batch_pb2.ListBatchesRequest | pipeline_pb2.ListPipelinesRequest,
        terms: Iterable[str] = (),
    ) -> tuple[list[WorkflowExecution], str]:
        """Return the tenant's workflows of a page, and the token of the next page. `terms` limit the page further.

        Raises ApiError INVALID_ARGUMENT for a page_token that Temporal refuses, UNAVAILABLE when it does not answer in
        time; RPCError, KeysUnavailable.
        """
        token = self._page_tokens.unseal(tenant, request)
        page = self._client.list_workflows(
            await self._query(tenant, request, terms),
            page_size=request.page_size or _DEFAULT_PAGE_SIZE,
            next_page_token=token,
        )
        try:
            async with asyncio.timeout(self._timeout / 2):
                await page.fetch_next_page()
        except TimeoutError as error:
            raise temporal_unavailable("Temporal did not list the page in time; call again") from error
        except RPCError as error:
            if token is not None and error.status in (RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.UNKNOWN):
                raise invalid([REFUSED]) from error
            raise
        # The id decides. A workflow that was started by hand may have any search attributes.
        own = [item for item in page.current_page or () if tenant_of(item.id) == tenant]
        return own, self._page_tokens.seal(tenant, request, page.next_page_token)

    async def _query(
        self,
        tenant: str,
        request: batch_pb2.ListBatchesRequest | pipeline_pb2.ListPipelinesRequest,
        more: Iterable[str],
    ) -> str:
        """Return the visibility query. Every value has passed a rule that forbids quotes."""
        terms = [f"WorkflowType = '{self._workflow_type}'", "ExecutionStatus != 'ContinuedAsNew'"]
        if tenant and self._knows_tenants:
            terms.append(f"{names.TENANT_ID.name} = '{tenant}'")
        elif self._knows_tenants:
            terms.append(f"{names.TENANT_ID.name} IS NULL")
        for key, value in ((names.USER_ID, request.user_id), (names.PROJECT_ID, request.project_id)):
            if not value:
                continue
            values = [value]
            if self._encryption is not None and (hash_ := await self._encryption.known_search_hash(tenant)):
                values.append(hash_(key.name, value))
            terms.append(f"{key.name} IN ({', '.join(repr(value) for value in values)})")
        return " AND ".join([*terms, *more])
