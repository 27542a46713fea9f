"""Pages of a tenant's batches or pipelines, from Temporal's visibility."""

from collections.abc import Iterable

from temporalio.client import Client, WorkflowExecution

from encryption import Encryption
from jobs import names
from llm_pb import batch_pb2, pipeline_pb2
from services.gateway.page_token import PageTokens
from services.gateway.settings import GatewaySettings
from services.gateway.visibility import DEFAULT_PAGE_SIZE, own_page, terms_of


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
        self._timeout = settings.list_timeout
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
        page = self._client.list_workflows(
            await self._query(tenant, request, terms),
            page_size=request.page_size or DEFAULT_PAGE_SIZE,
            next_page_token=self._page_tokens.unseal(tenant, request),
        )
        return await own_page(page, tenant, request, self._page_tokens, self._timeout / 2)

    async def _query(
        self,
        tenant: str,
        request: batch_pb2.ListBatchesRequest | pipeline_pb2.ListPipelinesRequest,
        more: Iterable[str],
    ) -> str:
        """Return the visibility query: see terms_of."""
        filters, hash_ = {names.USER_ID: request.user_id, names.PROJECT_ID: request.project_id}, None
        if self._encryption is not None and any(filters.values()):
            hash_ = await self._encryption.known_search_hash(tenant)
        own = terms_of(tenant, filters, hash_, knows_tenants=self._knows_tenants)
        kind = f"WorkflowType = '{self._workflow_type}'"
        return " AND ".join((kind, "ExecutionStatus != 'ContinuedAsNew'", *own, *more))
