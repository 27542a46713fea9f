"""Tenants: whose a workflow is, and the share of the GPUs that each tenant has.

A workflow's id tells its tenant, so that whose it is, is known before Temporal is asked.
"""

import time
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from temporalio.common import Priority

from jobs.ids import tenant_of
from jobs.search import Hash
from jobs.start import fair_owner, fair_turns
from runtime.auth import Caller
from services.gateway.errors import not_found

MAX_OPEN_JOBS: Final = 5000
"""Maximum of max_open_jobs: the ids of the open jobs must fit into one payload of Temporal's, 255 bytes each."""
_ACTIVE: Final = timedelta(minutes=5)
"""Time after their last job for which users count among those that share their tenant's weight."""
_MAX_TURNS: Final = 100
"""Maximum number of users of a tenant who take turns by themselves. Further ones share as many turns, so that a tenant
gets no lasting share by inventing users. The first jobs of as many new users weigh 1 + 1/2 + ... + 1/100 together."""


def require_own(caller: Caller, workflow_id: str) -> None:
    """Raise ApiError NOT_FOUND for the id of another tenant's workflow, whether there is one or not."""
    if tenant_of(workflow_id) != caller.tenant:
        raise not_found(workflow_id)


class TenantSettings(BaseModel):
    """The settings for one tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(1, ge=0.1, le=100)
    """The tenant's share of the GPUs while others wait, relative to the shares of others. Its users share it."""
    requests_per_second: float | None = Field(None, ge=0.001, le=1_000_000)
    """The calls a second that each gateway serves the tenant on average. None: not limited."""
    request_burst: int | None = Field(None, ge=1, le=1_000_000)
    """The calls that each gateway serves the tenant at once. None: those of a second, at least one."""
    max_open_jobs: int | None = Field(None, ge=0, le=MAX_OPEN_JOBS)
    """The maximum number of the tenant's jobs whose outcome is not settled, at all gateways. None: not limited."""

    @model_validator(mode="after")
    def _burst_has_a_rate(self) -> Self:
        if self.request_burst is not None and self.requests_per_second is None:
            raise ValueError("request_burst needs requests_per_second")
        return self


_DEFAULT: Final = TenantSettings()


class Turns:
    """Shares each tenant's weight out among its users who have submitted jobs at this gateway in the last minutes."""

    def __init__(self, tenants: Mapping[str, TenantSettings], now: Callable[[], float] = time.monotonic) -> None:
        """`now` returns seconds."""
        self._tenants = tenants
        self._now = now
        self._seen: defaultdict[str, OrderedDict[str, float]] = defaultdict(OrderedDict)
        """When each active user of a tenant was last seen, the oldest first."""

    def priority(self, tenant: str, user_id: str, hash_: Hash | None = None) -> Priority:
        """Return the priority of the workflow of a job that the user submits now. `hash_` is that of job_start()."""
        if not tenant:
            return fair_turns(fair_owner(user_id, tenant, hash_))
        seen, now = self._seen[tenant], self._now()
        while seen and next(iter(seen.values())) < now - _ACTIVE.total_seconds():
            seen.popitem(last=False)
        user = user_id
        if user in seen or len(seen) < _MAX_TURNS:
            seen[user] = now
            seen.move_to_end(user)
        else:
            # No user has this name.
            user = f"#{zlib.crc32(user_id.encode()) % _MAX_TURNS}"
        return fair_turns(fair_owner(user, tenant, hash_), self._tenants.get(tenant, _DEFAULT).weight / len(seen))
