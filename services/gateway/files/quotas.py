"""The quotas of files: how many a tenant may have, and of what size together.

What a tenant has is read from Temporal's visibility, which shows a change after a moment. A gateway adds what its own
uploads have taken since. So nothing has to be given back, and nothing is lost with a gateway; several gateways may
together exceed a quota by what they take in the time between two looks.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from llm_pb import file_pb2, llm_pb2
from runtime.shared_calls import SharedCalls
from services.gateway.errors import quota_exceeded
from services.gateway.files.reader import FileReader
from services.gateway.metrics import GatewayMetrics
from services.gateway.tenants import TenantSettings

_FRESH: Final = timedelta(seconds=5)
_WAIT: Final = timedelta(seconds=30)
"""The wait that an upload beyond a quota is asked for. Nobody knows when a file goes."""
_SHOWN_AFTER: Final = timedelta(seconds=30)
"""Time after which visibility surely shows a file."""


@dataclass
class _Known:
    """What a gateway knows of a tenant's files."""

    sizes: dict[str, int] = field(default_factory=dict)
    """By id, as Temporal lists them."""
    looked_at: float | None = None
    own: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The size, and the time, that an upload at this gateway has taken last."""


class FileQuotas:
    """How many files the tenants may have."""

    def __init__(self, reader: FileReader, tenants: Mapping[str, TenantSettings], metrics: GatewayMetrics) -> None:
        self._reader = reader
        self._metrics = metrics
        self._shared = SharedCalls()
        self._tenants = {
            name: tenant
            for name, tenant in tenants.items()
            if tenant.max_files is not None or tenant.max_file_bytes is not None
        }
        self._known: dict[str, _Known] = {name: _Known() for name in self._tenants}

    async def take(self, tenant: str, file_id: str, size: int) -> None:
        """Count a file that has, or is about to have, a size. It may be counted already.

        Raises ApiError RESOURCE_EXHAUSTED beyond a quota, UNAVAILABLE when Temporal does not list the files; RPCError.
        """
        if (limits := self._tenants.get(tenant)) is None:
            return
        others = await self._sizes(tenant)
        size = max(size, others.pop(file_id, 0))
        if limits.max_files is not None and len(others) >= limits.max_files:
            rule = f"tenant {tenant} may have {limits.max_files} files; delete one, or call again when one has expired"
            raise self._refusal(tenant, "max_files", rule)
        if limits.max_file_bytes is not None and sum(others.values()) + size > limits.max_file_bytes:
            rule = f"the files of tenant {tenant} may have {limits.max_file_bytes} bytes together; "
            if size > limits.max_file_bytes:
                raise self._refusal(tenant, "max_file_bytes", f"{rule}one of {size} bytes never fits", None)
            raise self._refusal(tenant, "max_file_bytes", f"{rule}delete one")
        self._known[tenant].own[file_id] = (size, asyncio.get_running_loop().time())

    def give_back(self, tenant: str, file_id: str) -> None:
        """Count a file no more that is gone."""
        if (known := self._known.get(tenant)) is not None:
            known.own.pop(file_id, None)
            known.sizes.pop(file_id, None)

    async def of(self, tenant: str) -> llm_pb2.FilesQuota | None:
        """Return the quota of a tenant, None without one. Raises like take()."""
        if (limits := self._tenants.get(tenant)) is None:
            return None
        sizes = await self._sizes(tenant)
        quota = llm_pb2.FilesQuota(used_files=len(sizes), used_bytes=sum(sizes.values()))
        if limits.max_files is not None:
            quota.limit_files = limits.max_files
        if limits.max_file_bytes is not None:
            quota.limit_bytes = limits.max_file_bytes
        return quota

    async def _sizes(self, tenant: str) -> dict[str, int]:
        known = self._known[tenant]
        now = asyncio.get_running_loop().time()
        if known.looked_at is None or now - known.looked_at > _FRESH.total_seconds():
            await self._shared.fresh(tenant, lambda: self._look(tenant))
        known.own = {id_: own for id_, own in known.own.items() if now - own[1] < _SHOWN_AFTER.total_seconds()}
        sizes = dict(known.sizes)
        for id_, (size, _) in known.own.items():
            sizes[id_] = max(size, sizes.get(id_, 0))
        return sizes

    async def _look(self, tenant: str) -> None:
        known = self._known[tenant]
        began = asyncio.get_running_loop().time()
        found = {file.ref.file_id: _size(file) async for file in self._reader.all_of(tenant)}
        known.sizes, known.looked_at = found, began

    def _refusal(self, tenant: str, quota: str, description: str, wait: timedelta | None = _WAIT) -> Exception:
        self._metrics.count_quota_refusal(tenant, quota)
        return quota_exceeded(tenant, quota, description, wait)


def _size(file: file_pb2.File) -> int:
    """Return what a file has, or is to have."""
    return max(file.committed_bytes, file.ref.size_bytes)
