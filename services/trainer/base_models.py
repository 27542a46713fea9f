"""The models that trainings start from: those of the settings, and trained ones from the store."""

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from jobs.ids import models_workflow_id
from jobs.records import read_record
from jobs.training import UNKNOWN_BASE_MODEL, find_version, trained_model
from llm_pb import internal_pb2
from runtime.temporal import RPC_TIMEOUT
from services.trainer.settings import TrainerSettings, folder_of
from store.models import get_model
from store.store import Store


class BaseModels:
    """Finds base models."""

    def __init__(self, client: Client, store: Store, settings: TrainerSettings) -> None:
        self._client = client
        self._store = store
        self._settings = settings

    async def resolve(self, name: str, tenant: str) -> str:
        """Return the name with a version in place of an alias. Raises ApplicationError for an unknown one."""
        if (trained := trained_model(name)) is None:
            self._folder(name)
            return name
        return f"{trained[0]}@{(await self._version(name, tenant)).version.version}"

    async def folder(self, name: str, tenant: str, into: Path, progressed: Callable[[], object]) -> Path:
        """Return the folder of a model, which is `into` for a trained one. Calls `progressed` for each piece of that.

        Raises ApplicationError for an unknown model, the errors of the store, RPCError, WorkflowQueryFailedError.
        """
        if trained_model(name) is None:
            return self._folder(name)
        await asyncio.to_thread(into.mkdir)
        await get_model(self._store, (await self._version(name, tenant)).files, into, progressed)
        return into

    def _folder(self, name: str) -> Path:
        if (folder := folder_of(self._settings, name)) is None:
            known = ", ".join(sorted(self._settings.base_models))
            raise _unknown(f"no model to start from is named {name!r}; there are {known}, and trained models")
        return folder

    async def _version(self, name: str, tenant: str) -> internal_pb2.RegisteredVersion:
        registry = await read_record(self._client, models_workflow_id(tenant), internal_pb2.ModelRegistry, RPC_TIMEOUT)
        found = find_version(registry, *(trained_model(name) or ("", "")))
        if found is None:
            raise _unknown(f"no model has been trained that is named {name!r}")
        return found


def digest_of(folder: Path) -> bytes:
    """Return the SHA-256 over the names and contents of the files in a folder. Raises OSError."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.digest()


def _unknown(message: str) -> ApplicationError:
    return ApplicationError(message, type=UNKNOWN_BASE_MODEL, non_retryable=True)
