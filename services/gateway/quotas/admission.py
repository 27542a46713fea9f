"""The quotas of tenants: calls a second, for each gateway by a token bucket; open jobs and tokens, for all by a ledger.

A tenant without a quota has no bucket and no ledger, so its calls and jobs cost what they cost without tenants.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, time, timedelta
from math import ceil
from typing import Final

from temporalio import activity
from temporalio.client import Client, WorkflowQueryFailedError

from jobs import names
from jobs.ids import ledger_workflow_id, tenant_of
from llm_pb import internal_pb2, llm_pb2
from runtime import audit
from runtime.auth import Caller
from runtime.group_commit import CommitError, TooManyWaitingError
from runtime.token_bucket import TokenBucket
from services.gateway.errors import exhausted, quota_exceeded, temporal_unavailable
from services.gateway.metrics import GatewayMetrics
from services.gateway.quotas.ledgers import Ledger, SlotReleases
from services.gateway.tenants import MAX_OPEN_JOBS, TenantSettings

_TOKENS: Final = "max_output_tokens_per_day"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_UNCOUNTED: Final = "what the tenant has open cannot be counted now; call again"
_START_WITHIN: Final = timedelta(seconds=30)
"""Maximum time from the request of a slot to the start of its job. The start itself takes at most 20 s, and the ledger
keeps the slot for a minute."""
_OPEN_JOBS_WAIT: Final = timedelta(seconds=5)
"""The wait that a Submit beyond the quota is asked for. Nobody knows when a job ends."""


class RequestQuotas:
    """How often the tenants may call this gateway."""

    def __init__(self, tenants: Mapping[str, TenantSettings], metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._buckets = {
            name: TokenBucket(rate, tenant.request_burst or max(ceil(rate), 1))
            for name, tenant in tenants.items()
            if (rate := tenant.requests_per_second) is not None
        }

    def take(self, caller: Caller) -> None:
        """Count a call. Raises ApiError RESOURCE_EXHAUSTED beyond the quota; the call does not count then."""
        bucket = self._buckets.get(caller.tenant)
        if bucket is not None and (wait := bucket.take()):
            self._metrics.count_quota_refusal(caller.tenant, "requests_per_second")
            allowed = f"{bucket.per_second:g} calls a second, {bucket.burst} at once"
            description = f"tenant {caller.tenant} may make {allowed}; call again in {wait:.3f} s"
            raise quota_exceeded(caller.tenant, "requests_per_second", description, timedelta(seconds=wait))

    def of(self, tenant: str) -> llm_pb2.RequestQuota | None:
        """Return the quota of a tenant, None without one."""
        if (bucket := self._buckets.get(tenant)) is None:
            return None
        return llm_pb2.RequestQuota(per_second=bucket.per_second, burst=bucket.burst, available=bucket.available)


class OpenJobQuotas:
    """How many jobs of the tenants may be open, and how many output tokens they may use a day."""

    def __init__(
        self, client: Client, workflow_queue: str, tenants: Mapping[str, TenantSettings], metrics: GatewayMetrics
    ) -> None:
        self._client = client
        self._workflow_queue = workflow_queue
        self._metrics = metrics
        self._releases = SlotReleases(client)
        self._tenants = tenants
        self._ledgers = {
            name: Ledger(
                client,
                workflow_queue,
                ledger_workflow_id(name),
                MAX_OPEN_JOBS if tenant.max_open_jobs is None else tenant.max_open_jobs,
                tenant.max_output_tokens_per_day,
            )
            for name, tenant in tenants.items()
            if tenant.max_open_jobs is not None or tenant.max_output_tokens_per_day is not None
        }

    @property
    def tenants(self) -> list[str]:
        """The tenants with a quota of open jobs or output tokens."""
        return [*self._ledgers]

    def ledger(self, tenant: str) -> str:
        """Return the workflow id of the tenant's ledger; empty without a quota."""
        ledger = self._ledgers.get(tenant)
        return "" if ledger is None else ledger.id

    def tokens_a_day(self, tenant: str) -> int | None:
        """Return how many output tokens the tenant may use a day, None without a quota of them."""
        ledger = self._ledgers.get(tenant)
        return None if ledger is None else ledger.tokens_per_day

    @activity.defn(name=names.ACTIVITY_LEASE_TOKENS)
    async def lease(self, request: internal_pb2.LeaseRequest) -> internal_pb2.LeaseResponse:
        """Lease output tokens to a batch. The quota is that of this gateway's settings, or else the batch's own."""
        tenant = tenant_of(request.workflow_id)
        ledger = self._ledgers.get(tenant)
        if ledger is None:
            ledger = Ledger(self._client, self._workflow_queue, ledger_workflow_id(tenant), MAX_OPEN_JOBS)
        else:
            request.ClearField("output_tokens_limit")
            if ledger.tokens_per_day is not None:
                request.output_tokens_limit = ledger.tokens_per_day
        return await ledger.lease(request)

    async def reserve(self, tenant: str, job_id: str, output_tokens: int, reservation: int = 0) -> "Reservation | str":
        """Reserve a slot and tokens for a job that is about to be started; return why not, for refusal().

        The same job needs one slot, however often it is reserved. `reservation` is as in
        ReserveRequest.reservations. Raises ApiError UNAVAILABLE when the ledger does not
        answer in time, RESOURCE_EXHAUSTED when too many Submits wait for it.
        """
        return await reserve_slot(self._ledgers[tenant], job_id, output_tokens, reservation)

    async def admit(self, tenant: str, id_: str, output_tokens: int, reservation: int = 0) -> Callable[[], None] | None:
        """Reserve a slot for a batch or pipeline; return what checks it just before the start. None without a quota.

        Raises ApiError like reserve(), and RESOURCE_EXHAUSTED without a free slot; AuditUnavailable.
        """
        if tenant not in self._ledgers:
            return None
        audit.require_available()
        reserved = await self.reserve(tenant, id_, output_tokens, reservation)
        if isinstance(reserved, str):
            raise self.refusal(tenant, reserved, output_tokens)
        return reserved.require_valid

    def refusal(self, tenant: str, why: str, output_tokens: int) -> Exception:
        """Return the ApiError for a job without a slot, and count it."""
        tokens_per_day = self._ledgers[tenant].tokens_per_day
        if tokens_per_day is not None and (why != names.QUOTA_REACHED or output_tokens > tokens_per_day):
            return self._tokens_refusal(tenant, why, output_tokens, tokens_per_day)
        self._metrics.count_quota_refusal(tenant, "max_open_jobs")
        limit = self._ledgers[tenant].limit
        description = f"tenant {tenant} may have {limit} open jobs; submit the job again when one has ended"
        return quota_exceeded(tenant, "max_open_jobs", description, _OPEN_JOBS_WAIT)

    def _tokens_refusal(self, tenant: str, why: str, output_tokens: int, tokens_per_day: int) -> Exception:
        self._metrics.count_quota_refusal(tenant, _TOKENS)
        description = f"tenant {tenant} may use {tokens_per_day} output tokens a day of UTC; "
        if output_tokens > tokens_per_day:
            description += f"a job that may need {output_tokens} never fits: ask for fewer tokens"
            return quota_exceeded(tenant, _TOKENS, description, None)
        if why == names.TOKENS_RESERVED:
            description += "its open jobs may need the rest; submit the job again when one has ended"
            return quota_exceeded(tenant, _TOKENS, description, _OPEN_JOBS_WAIT)
        now = datetime.now(UTC)
        description += "submit the job again tomorrow, or ask for fewer tokens"
        return quota_exceeded(tenant, _TOKENS, description, _midnight_after(now) - now)

    async def release(self, tenant: str, job_id: str, reservation: int = 0, output_tokens: int = 0) -> None:
        """Release the slot of a job that has ended, and has used so many output tokens of it.

        A job may have ended when it was reserved. `reservation` is as in ReleaseRequest.reservations.
        """
        await self._releases.release(self._ledgers[tenant].id, job_id, output_tokens, reservation)

    async def of(self, tenant: str) -> llm_pb2.OpenJobsQuota | None:
        """Return the quota of a tenant, None without one. Raises RPCError, ApiError UNAVAILABLE."""
        if (ledger := self._ledgers.get(tenant)) is None or self._tenants[tenant].max_open_jobs is None:
            return None
        try:
            return llm_pb2.OpenJobsQuota(limit=ledger.limit, used=await ledger.used())
        except WorkflowQueryFailedError as error:
            raise temporal_unavailable(_UNCOUNTED) from error

    async def shares(self, tenant: str) -> dict[str, float]:
        """Return the used share of each quota of a tenant of `tenants`, by quota. A quota of nothing has none.

        Raises RPCError, ApiError UNAVAILABLE.
        """
        ledger, limits, shares = self._ledgers[tenant], self._tenants[tenant], {}
        usage = await self._usage(ledger)
        if limits.max_open_jobs:
            shares["max_open_jobs"] = usage.slots / limits.max_open_jobs
        if limits.max_output_tokens_per_day:
            shares[_TOKENS] = (_used_today(usage) + usage.reserved_tokens) / limits.max_output_tokens_per_day
        return shares

    async def tokens_of(self, tenant: str) -> llm_pb2.OutputTokensQuota | None:
        """Return the quota of output tokens of a tenant, None without one. Raises RPCError, ApiError UNAVAILABLE."""
        if (ledger := self._ledgers.get(tenant)) is None or ledger.tokens_per_day is None:
            return None
        usage = await self._usage(ledger)
        quota = llm_pb2.OutputTokensQuota(
            limit_per_day=ledger.tokens_per_day, used=_used_today(usage), reserved=usage.reserved_tokens
        )
        quota.reset_time.FromDatetime(_midnight_after(datetime.now(UTC)))
        return quota

    async def _usage(self, ledger: Ledger) -> internal_pb2.LedgerUsage:
        try:
            return await ledger.usage()
        except WorkflowQueryFailedError as error:
            raise temporal_unavailable(_UNCOUNTED) from error


def _used_today(usage: internal_pb2.LedgerUsage) -> int:
    return usage.used_tokens if usage.day == (datetime.now(UTC) - _EPOCH).days else 0


def _midnight_after(now: datetime) -> datetime:
    return datetime.combine(now.date() + timedelta(days=1), time(), UTC)


async def reserve_slot(ledger: Ledger, id_: str, output_tokens: int = 0, reservation: int = 0) -> "Reservation | str":
    """Reserve a slot of the ledger; return the type of error of Reserve that says why none is free.

    Raises ApiError like OpenJobQuotas.reserve().
    """
    began = asyncio.get_running_loop().time()
    try:
        refused = await ledger.reserve(id_, output_tokens, reservation)
    except TooManyWaitingError:
        raise exhausted("too many calls of the tenant wait at this gateway; call again") from None
    except (CommitError, TimeoutError) as error:
        raise temporal_unavailable(_UNCOUNTED) from error
    return refused or Reservation(began)


class Reservation:
    """A slot for a workflow that is about to be started."""

    def __init__(self, began: float) -> None:
        """`began` is the loop's time when the slot was asked for."""
        self._until = began + _START_WITHIN.total_seconds()

    def require_valid(self) -> None:
        """Raise ApiError UNAVAILABLE if the ledger may free the slot before the workflow starts: after a suspension."""
        if asyncio.get_running_loop().time() > self._until:
            raise temporal_unavailable("this gateway was suspended while it handled the call; call again")
