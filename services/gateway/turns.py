"""The turns of users: the share of the GPUs that each tenant has in a class, shared out among them."""

import time
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

from temporalio.common import Priority

from jobs.search import Hash
from jobs.start import fair_owner, fair_turns
from llm_pb import common_pb2
from services.gateway.class_settings import Classes
from services.gateway.tenants import TenantSettings

_ACTIVE: Final = timedelta(minutes=5)
"""Time after their last job for which users count among those that share their tenant's weight."""
_MAX_TURNS: Final = 100
"""Maximum number of users of a tenant who take turns by themselves. Further ones share as many turns, so that a tenant
gets no larger share by inventing users."""
_DEFAULT: Final = TenantSettings()
_DEFAULT_CLASSES: Final = Classes()
_STANDARD: Final = common_pb2.JOB_CLASS_STANDARD


class Turns:
    """Shares each tenant's weight out among its users who have submitted jobs at this gateway in the last minutes.

    Each class of jobs has turns of its own: its weight times the tenant's.
    """

    def __init__(
        self,
        tenants: Mapping[str, TenantSettings],
        now: Callable[[], float] = time.monotonic,
        *,
        classes: Classes = _DEFAULT_CLASSES,
    ) -> None:
        """`now` returns seconds."""
        self._tenants = tenants
        self._classes = classes
        self._now = now
        self._seen: defaultdict[tuple[str, common_pb2.JobClass.ValueType], OrderedDict[str, float]]
        self._seen = defaultdict(OrderedDict)
        """When each active user of a tenant's class was last seen, the oldest first."""

    def priority(
        self,
        tenant: str,
        user_id: str,
        hash_: Hash | None = None,
        job_class: "common_pb2.JobClass.ValueType" = _STANDARD,
    ) -> Priority:
        """Return the priority of the workflow of a job that the user submits now. `hash_` is that of job_start()."""
        turns = self._classes.turns(job_class)
        if not tenant:
            weight = None if job_class == _STANDARD else turns
            return fair_turns(fair_owner(user_id, tenant, hash_, job_class), weight)
        seen, now = self._seen[tenant, job_class], self._now()
        while seen and next(iter(seen.values())) < now - _ACTIVE.total_seconds():
            seen.popitem(last=False)
        user = user_id
        if user in seen or len(seen) < _MAX_TURNS:
            seen[user] = now
            seen.move_to_end(user)
        else:
            # No user has this name.
            user = f"#{zlib.crc32(user_id.encode()) % _MAX_TURNS}"
        share = self._tenants.get(tenant, _DEFAULT).weight / len(seen)
        return fair_turns(fair_owner(user, tenant, hash_, job_class), turns * share)
