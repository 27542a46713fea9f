"""The turns of users: the share of the GPUs that each tenant has, shared out among them."""

import time
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

from temporalio.common import Priority

from jobs.search import Hash
from jobs.start import fair_owner, fair_turns
from services.gateway.tenants import TenantSettings

_ACTIVE: Final = timedelta(minutes=5)
"""Time after their last job for which users count among those that share their tenant's weight."""
_MAX_TURNS: Final = 100
"""Maximum number of users of a tenant who take turns by themselves. Further ones share as many turns, so that a tenant
gets no larger share by inventing users."""
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
