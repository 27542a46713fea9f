"""The quotas of tenants: calls a second, for each gateway by a token bucket, and open jobs, for all by a ledger.

A tenant without a quota has no bucket and no ledger, so its calls and jobs cost what they cost without tenants.
"""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from math import ceil
from typing import Final

from temporalio.client import Client, WorkflowQueryFailedError

from jobs.ids import ledger_workflow_id
from llm_pb import llm_pb2
from runtime.auth import Caller
from runtime.group_commit import CommitError, TooManyWaitingError
from runtime.token_bucket import TokenBucket
from services.gateway.errors import exhausted, quota_exceeded, temporal_unavailable
from services.gateway.ledgers import Ledger, SlotReleases
from services.gateway.metrics import GatewayMetrics
from services.gateway.tenants import TenantSettings

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
            self._metrics.quota_refusals.add(1, {"llm.quota": "requests_per_second"})
            allowed = f"{bucket.per_second:g} calls a second, {bucket.burst} at once"
            description = f"tenant {caller.tenant} may make {allowed}; call again in {wait:.3f} s"
            raise quota_exceeded(caller.tenant, "requests_per_second", description, timedelta(seconds=wait))

    def of(self, tenant: str) -> llm_pb2.RequestQuota | None:
        """Return the quota of a tenant, None without one."""
        if (bucket := self._buckets.get(tenant)) is None:
            return None
        return llm_pb2.RequestQuota(per_second=bucket.per_second, burst=bucket.burst, available=bucket.available)


class OpenJobQuotas:
    """How many jobs of the tenants may be open."""

    def __init__(
        self, client: Client, workflow_queue: str, tenants: Mapping[str, TenantSettings], metrics: GatewayMetrics
    ) -> None:
        self._metrics = metrics
        self._releases = SlotReleases(client)
        self._ledgers = {
            name: Ledger(client, workflow_queue, ledger_workflow_id(name), tenant.max_open_jobs)
            for name, tenant in tenants.items()
            if tenant.max_open_jobs is not None
        }

    def ledger(self, tenant: str) -> str:
        """Return the workflow id of the tenant's ledger; empty without a quota."""
        ledger = self._ledgers.get(tenant)
        return "" if ledger is None else ledger.id

    async def reserve(self, tenant: str, job_id: str) -> "Reservation | None":
        """Reserve a slot for a job that is about to be started; return None when no slot is free.

        The same job needs one slot, however often it is reserved. Raises ApiError UNAVAILABLE when the ledger does not
        answer in time, RESOURCE_EXHAUSTED when too many Submits wait for it.
        """
        return await reserve_slot(self._ledgers[tenant], job_id)

    def refusal(self, tenant: str) -> Exception:
        """Return the ApiError for a job without a slot, and count it."""
        self._metrics.quota_refusals.add(1, {"llm.quota": "max_open_jobs"})
        limit = self._ledgers[tenant].limit
        description = f"tenant {tenant} may have {limit} open jobs; submit the job again when one has ended"
        return quota_exceeded(tenant, "max_open_jobs", description, _OPEN_JOBS_WAIT)

    async def release(self, tenant: str, job_id: str) -> None:
        """Release the slot of a job that was reserved although the job had ended."""
        await self._releases.release(self._ledgers[tenant].id, job_id)

    async def of(self, tenant: str) -> llm_pb2.OpenJobsQuota | None:
        """Return the quota of a tenant, None without one. Raises RPCError, ApiError UNAVAILABLE."""
        if (ledger := self._ledgers.get(tenant)) is None:
            return None
        try:
            return llm_pb2.OpenJobsQuota(limit=ledger.limit, used=await ledger.used())
        except WorkflowQueryFailedError as error:
            raise temporal_unavailable(_UNCOUNTED) from error


async def reserve_slot(ledger: Ledger, id_: str) -> "Reservation | None":
    """Reserve a slot of the ledger; return None when none is free. Raises ApiError like OpenJobQuotas.reserve()."""
    began = asyncio.get_running_loop().time()
    try:
        reserved = await ledger.reserve(id_)
    except TooManyWaitingError:
        raise exhausted("too many calls of the tenant wait at this gateway; call again") from None
    except (CommitError, TimeoutError) as error:
        raise temporal_unavailable(_UNCOUNTED) from error
    return Reservation(began) if reserved else None


class Reservation:
    """A slot for a workflow that is about to be started."""

    def __init__(self, began: float) -> None:
        """`began` is the loop's time when the slot was asked for."""
        self._until = began + _START_WITHIN.total_seconds()

    def require_valid(self) -> None:
        """Raise ApiError UNAVAILABLE if the ledger may free the slot before the workflow starts: after a suspension."""
        if asyncio.get_running_loop().time() > self._until:
            raise temporal_unavailable("this gateway was suspended while it handled the call; call again")
