"""Removes what lies in the store for batches that Temporal does not have any more."""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final

from temporalio.client import Client
from temporalio.service import RPCError

from batches.objects import ROOT, folder_of
from jobs import names
from jobs.ids import tenant_of
from runtime.background import sweeping
from services.gateway.settings import GatewaySettings
from store.store import Store, StoreUnavailable

_AT_ONCE: Final = 100
_PAUSE_SECONDS: Final = 0.05
"""Pause after each removal: it must not be felt by anybody."""


class BatchSweeper:
    """Looks for objects of batches that are past their retention, and for those of attempts that came too late."""

    def __init__(self, client: Client, store: Store, settings: GatewaySettings) -> None:
        self._client = client
        self._store = store
        self._settings = settings

    async def keep_sweeping(self) -> None:
        """Sweep at the interval of the settings, until cancelled."""
        await sweeping("batches", self._settings.file_sweep_interval, self.sweep, StoreUnavailable, RPCError)

    async def sweep(self) -> int:
        """Remove old objects of unknown batches; return how many. Raises StoreUnavailable, RPCError.

        A batch is in Temporal's list before it writes its first object, and an object is old only after much longer
        than the list takes.
        """
        known = {
            folder_of(item.id, tenant_of(item.id))
            async for item in self._client.list_workflows(f"WorkflowType = '{names.BATCH_WORKFLOW_TYPE}'")
        }
        removed, unknown = 0, list[str]()
        async with aclosing(self._store.list(ROOT)) as objects:
            async for item in objects:
                folder = "/".join(item.name.split("/")[:3]) + "/"
                if folder not in known and datetime.now(UTC) - item.modified > self._settings.file_sweep_age:
                    unknown.append(item.name)
                if len(unknown) == _AT_ONCE:
                    await self._store.delete(unknown)
                    removed, unknown = removed + len(unknown), []
                    await asyncio.sleep(_PAUSE_SECONDS)
        await self._store.delete(unknown)
        return removed + len(unknown)
