"""ListSchedules: finds the schedules of a page in Temporal's visibility. And how many a tenant has."""

from temporalio.client import Client, ScheduleListDescription

from encryption import Encryption, KeysUnavailable, is_hash
from jobs import names
from jobs.search import Hash
from llm_pb import schedule_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from runtime.temporal import RPC_TIMEOUT
from services.gateway.page_token import PageTokens
from services.gateway.schedule_client import client_for
from services.gateway.schedules.reader import timestamp
from services.gateway.settings import GatewaySettings
from services.gateway.visibility import DEFAULT_PAGE_SIZE, own_page, terms_of


class ScheduleListing:
    """Lists and counts schedules."""

    def __init__(
        self,
        client: Client,
        page_tokens: PageTokens,
        settings: GatewaySettings,
        encryption: Encryption | None,
        *,
        knows_tenants: bool,
    ) -> None:
        """`knows_tenants`: whether the namespace has the search attribute TenantId."""
        self._client = client
        self._page_tokens = page_tokens
        self._timeout = settings.list_timeout
        self._encryption = encryption
        self._knows_tenants = knows_tenants

    async def list_page(
        self, caller: Caller, request: schedule_pb2.ListSchedulesRequest
    ) -> schedule_pb2.ListSchedulesResponse:
        """Return a page of the schedules of the caller's tenant. Raises like JobListing.list_page."""
        hash_ = None
        if self._encryption is not None and request.user_id:
            hash_ = await self._encryption.known_search_hash(caller.tenant)
        page = await self._client.list_schedules(
            _query(caller.tenant, request.user_id, hash_, knows_tenants=self._knows_tenants),
            page_size=request.page_size or DEFAULT_PAGE_SIZE,
            next_page_token=self._page_tokens.unseal(caller.tenant, request),
            rpc_timeout=RPC_TIMEOUT,
        )
        own, following = await own_page(page, caller.tenant, request, self._page_tokens, self._timeout)
        return schedule_pb2.ListSchedulesResponse(
            schedules=[await self._summary(item) for item in own if _is_ours(item)], next_page_token=following
        )

    async def count(self, tenant: str) -> int:
        """Return the number of schedules of a tenant, as visibility shows it: a second or so late. Raises RPCError."""
        query = (
            "TemporalNamespaceDivision = 'TemporalScheduler' AND ExecutionStatus = 'Running' AND "
            f"{_query(tenant, '', None, knows_tenants=self._knows_tenants)}"
        )
        return (await self._client.count_workflows(query, rpc_timeout=RPC_TIMEOUT)).count

    async def _summary(self, item: ScheduleListDescription) -> schedule_pb2.ScheduleSummary:
        attributes = await self._attributes(item)
        summary = schedule_pb2.ScheduleSummary(
            schedule_id=item.id,
            user_id=attributes.get(names.USER_ID.name, ""),
            request_id=attributes.get(names.REQUEST_ID.name, ""),
            model=attributes.get(names.MODEL.name, ""),
            paused=item.schedule is not None and item.schedule.state.paused,
        )
        if item.info is not None and item.info.next_action_times:
            summary.next_time.CopyFrom(timestamp(item.info.next_action_times[0]))
        if item.info is not None and item.info.recent_actions:
            summary.last_time.CopyFrom(timestamp(item.info.recent_actions[-1].started_at))
        return summary

    async def _attributes(self, item: ScheduleListDescription) -> dict[str, str]:
        """Return the search attributes by name. Hashed ones are in the memo, and absent if that is unreadable."""
        keys = (names.USER_ID, names.REQUEST_ID, names.MODEL)
        values = {key.name: item.typed_search_attributes.get(key) or "" for key in keys}
        if any(map(is_hash, values.values())):
            values = {name: value for name, value in values.items() if not is_hash(value)}
            item.data_converter = client_for(self._client, item.id).data_converter
            try:
                clear = await item.memo_value(names.MEMO_SEARCH_ATTRIBUTES, None)
            except (PayloadError, KeysUnavailable):
                clear = None
            if isinstance(clear, dict):
                values |= {name: text for name, text in clear.items() if isinstance(text, str)}
        return values


def _query(tenant: str, user_id: str, hash_: Hash | None, *, knows_tenants: bool) -> str:
    """Return the visibility query for the schedules of a tenant: see terms_of."""
    own = terms_of(tenant, {names.USER_ID: user_id}, hash_, knows_tenants=knows_tenants)
    # Schedules of the operator's own have no request_id.
    return " AND ".join((f"{names.REQUEST_ID.name} IS NOT NULL", *own))


def _is_ours(item: ScheduleListDescription) -> bool:
    return item.schedule is not None and getattr(item.schedule.action, "workflow", "") == names.SCHEDULED_WORKFLOW_TYPE
