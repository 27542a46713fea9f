"""Tenants: whose a workflow is, and the share of the GPUs that each tenant has.

A workflow's id tells its tenant, so that whose it is, is known before Temporal is asked.
"""

import time
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

from pydantic import BaseModel, ConfigDict, Field
from temporalio.common import Priority

from jobs.ids import owner, tenant_of
from jobs.start import fair_turns
from runtime.grpc_auth import Caller
from services.gateway.errors import not_found

_ACTIVE: Final = timedelta(minutes=5)
"""Time after their last job for which users count among those that share their tenant's weight."""
_MAX_TURNS: Final = 100
"""Maximum number of users of a tenant who take turns by themselves. Further ones share as many turns, so that a tenant
gets no larger share by inventing users."""


def require_own(caller: Caller, workflow_id: str) -> None:
    """Raise ApiError NOT_FOUND for the id of another tenant's workflow, whether there is one or not."""
    if tenant_of(workflow_id) != caller.tenant:
        raise not_found(workflow_id)


class TenantSettings(BaseModel):
    """The settings for one tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(1, ge=0.1, le=100)
    """The tenant's share of the GPUs while others wait, relative to the shares of others. Its users share it."""


_DEFAULT: Final = TenantSettings()


class Turns:
    """Shares each tenant's weight out among its users who have submitted jobs at this gateway in the last minutes."""

    def __init__(self, tenants: Mapping[str, TenantSettings], now: Callable[[], float] = time.monotonic) -> None:
        """`now` returns seconds."""
        self._tenants = tenants
        self._now = now
        self._seen: defaultdict[str, OrderedDict[str, float]] = defaultdict(OrderedDict)
        """When each active user of a tenant was last seen, the oldest first."""

    def priority(self, tenant: str, user_id: str) -> Priority:
        """Return the priority of the workflow of a job that the user submits now."""
        if not tenant:
            return fair_turns(user_id)
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
        return fair_turns(owner(user, tenant), self._tenants.get(tenant, _DEFAULT).weight / len(seen))
