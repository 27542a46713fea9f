"""Loads a trained model from the registry of its tenant and the store, before the engine loads it from a folder."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from temporalio.client import Client, WorkflowQueryFailedError
from temporalio.service import RPCError

from encryption import KeysUnavailable, Unreadable
from jobs.errors import EngineDead
from jobs.ids import models_workflow_id
from jobs.records import read_record
from jobs.training import find_version, trained_model
from llm_pb import internal_pb2
from payload_converter import PayloadError
from runtime.health import Readiness
from runtime.temporal import RPC_TIMEOUT
from runtime.work_folders import sweep_work_folders, work_folder
from services.gpu_worker.engines.engine import Engine
from services.gpu_worker.settings import GpuWorkerSettings
from store.models import get_model
from store.store import ObjectMissing, Store, StoreUnavailable

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 2
_PREFIX: Final = "durable-llm-model-"


@asynccontextmanager
async def model_folder(settings: GpuWorkerSettings) -> AsyncIterator[str]:
    """Provide the path of the model: that of the settings, or for a trained model a folder until the context closes."""
    if not settings.is_trained:
        yield settings.model_path
        return
    await asyncio.to_thread(sweep_work_folders, _PREFIX)
    with work_folder(_PREFIX) as folder:
        yield str(folder)


async def load(
    engine: Engine,
    folder: str,
    settings: GpuWorkerSettings,
    store: Store | None,
    readiness: Readiness,
    client: "asyncio.Future[Client]",
) -> None:
    """Start the engine; fetch a trained model first. Waits for a store or a Temporal that is away.

    Raises EngineDead, also for a model that there is not.
    """
    if settings.is_trained:
        try:
            version = await _fetch(Path(folder), settings, store, await client)
        except EngineDead:
            engine.dead.set()
            raise
        _log.info("%s is version %d", settings.model, version)
        readiness.describe(model_version=str(version))
    await engine.start()
    # What is loaded stays, so the garbage collector need not look at it again.
    gc.collect()
    gc.freeze()


async def _fetch(folder: Path, settings: GpuWorkerSettings, store: Store | None, client: Client) -> int:
    """Write the model's files into the folder; return its version."""
    if store is None:
        raise EngineDead("a trained model is in the store of files, and this worker has none (STORE_URL)")
    name, which = trained_model(settings.model) or ("", "")
    while True:
        try:
            registry = await read_record(
                client, models_workflow_id(settings.model_tenant), internal_pb2.ModelRegistry, RPC_TIMEOUT
            )
            found = find_version(registry, name, which)
            if found is None:
                raise EngineDead(f"no model {settings.model!r} has been trained: see GPU_WORKER_MODEL_TENANT")
            await get_model(store, found.files, folder)
        except (StoreUnavailable, KeysUnavailable, WorkflowQueryFailedError, RPCError) as error:
            _log.warning("the model cannot be fetched yet: %s", error)
        except (ObjectMissing, Unreadable, PayloadError, ValueError) as error:
            raise EngineDead(f"the model {settings.model!r} cannot be read: {error}") from error
        else:
            return found.version.version
        await asyncio.sleep(_RETRY_SECONDS)
