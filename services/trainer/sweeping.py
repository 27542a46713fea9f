"""Removes from the store what trainings have left: old tokens, old checkpoints, models that no version names."""

import asyncio
import logging
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final

from temporalio.client import Client, WorkflowQueryFailedError
from temporalio.service import RPCError

from encryption import KeysUnavailable
from jobs.ids import models_workflow_id
from jobs.records import read_record
from llm_pb import internal_pb2
from payload_converter import PayloadError
from runtime.background import sweeping
from runtime.temporal import RPC_TIMEOUT
from runtime.work_folders import sweep_work_folders
from services.trainer.settings import WORK_PREFIX, TrainerSettings
from services.trainer.shards import TRAINING_FOLDER
from store.models import MODELS_FOLDER
from store.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)
_PAUSE_SECONDS: Final = 0.05
"""Pause after each removal: it must not be felt by anybody."""


class TrainingSweeper:
    """Looks for objects of trainings that nobody needs any more."""

    def __init__(self, client: Client, store: Store, settings: TrainerSettings) -> None:
        self._client = client
        self._store = store
        self._settings = settings

    async def keep_sweeping(self) -> None:
        """Sweep the disk once, and the store at the interval of the settings, until cancelled."""
        await asyncio.to_thread(sweep_work_folders, WORK_PREFIX, self._settings.work_dir)
        await sweeping("trainings", self._settings.sweep_interval, self.sweep, StoreUnavailable, RPCError)

    async def sweep(self) -> int:
        """Remove old objects; return how many.

        Raises StoreUnavailable, RPCError.
        """
        removed, named = 0, dict[str, set[str] | None]()
        for folder in (TRAINING_FOLDER, MODELS_FOLDER):
            async with aclosing(self._store.list(folder)) as objects:
                async for item in objects:
                    if datetime.now(UTC) - item.modified < self._settings.keep:
                        continue
                    if folder == MODELS_FOLDER and await self._is_named(item.name, named):
                        continue
                    await self._store.delete([item.name])
                    removed += 1
                    await asyncio.sleep(_PAUSE_SECONDS)
        return removed

    async def _is_named(self, name: str, known: dict[str, set[str] | None]) -> bool:
        """Return whether the registry of an object's tenant names it. True where the registry cannot be read."""
        tenant = name.split("/")[1]
        if tenant not in known:
            known[tenant] = await self._named("" if tenant == "-" else tenant)
        named = known[tenant]
        return named is None or name in named

    async def _named(self, tenant: str) -> set[str] | None:
        try:
            registry = await read_record(
                self._client, models_workflow_id(tenant), internal_pb2.ModelRegistry, RPC_TIMEOUT
            )
        except (WorkflowQueryFailedError, KeysUnavailable, PayloadError) as error:
            # Its keys may be gone for ever. That must not keep the objects of others.
            _log.warning("the registry of trained models of tenant %r cannot be read: %r", tenant, error)
            return None
        return {file.object for model in registry.models for version in model.versions for file in version.files}
