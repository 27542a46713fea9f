"""Removes objects from the store: those of a file that is gone, and those that no file has.

An object that no file has was left by an upload that died between the write to the store and the commit. It looks like
one whose commit is under way, so only an old one is removed: see GATEWAY_FILE_SWEEP_AGE.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final

from temporalio import activity
from temporalio.service import RPCError

from encryption import KeysUnavailable
from encryption.tenants import TENANT_PATTERN
from jobs import names
from jobs.ids import FILE_ID_PATTERN, file_workflow_id
from llm_pb import internal_pb2
from payload_converter import PayloadError
from runtime.background import sweeping
from services.gateway.errors import ApiError
from services.gateway.files.outputs import OutputSweeper
from services.gateway.files.quotas import FileQuotas
from services.gateway.files.reader import FileReader
from services.gateway.settings import GatewaySettings
from store.encrypted import ENDING
from store.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)
_FOLDER: Final = "files/"
_FOLDER_OF_FILE: Final = re.compile(
    rf"{_FOLDER}(?P<tenant>-|{TENANT_PATTERN.pattern})/(?P<file_id>{FILE_ID_PATTERN.pattern})/[0-9a-f]{{32}}/"
)
"""The prefix of a file: see FileRecords.begin()."""
_NAME: Final = re.compile(rf"{_FOLDER_OF_FILE.pattern}[0-9a-f]{{32}}({re.escape(ENDING)})?")
"""The name of an object of a file: see FileRecords.begin() and Store.new_name()."""
_AT_ONCE: Final = 100
"""Objects that are removed with one request, where the store can."""
_PAUSE_SECONDS: Final = 0.05
"""Pause after each record that a sweep reads: it must not be felt by anybody."""


class FileRemoval:
    """The activity of a file's workflow."""

    def __init__(self, store: Store | None, quotas: FileQuotas) -> None:
        self._store = store
        self._quotas = quotas

    @activity.defn(name=names.ACTIVITY_REMOVE_FILE)
    async def remove_file(self, request: internal_pb2.RemoveFileRequest) -> None:
        """Remove everything under the file's prefix. Raises StoreUnavailable, and is then tried again.

        The quotas count the file no more, however it has come to its end.
        """
        if request.HasField("create_time") and (found := _FOLDER_OF_FILE.fullmatch(request.prefix)) is not None:
            tenant = "" if found["tenant"] == "-" else found["tenant"]
            await self._quotas.give_back(tenant, found["file_id"], request.create_time.ToNanoseconds())
        # A record that was started by hand may have none, and all files have this one.
        if request.prefix.startswith(_FOLDER) and request.prefix != _FOLDER:
            if self._store is None:
                raise StoreUnavailable("STORE_URL is not set, and a file is to be removed from the store")
            await _remove_all(self._store, request.prefix)


class Sweeper:
    """Looks for objects that no file has."""

    def __init__(self, store: Store, reader: FileReader, outputs: OutputSweeper, settings: GatewaySettings) -> None:
        """`outputs` looks for those that no job has."""
        self._outputs = outputs
        self._store = store
        self._reader = reader
        self._settings = settings

    async def keep_sweeping(self) -> None:
        """Sweep at the interval of the settings, until cancelled."""
        passing = (StoreUnavailable, RPCError, ApiError, KeysUnavailable, PayloadError)
        await sweeping("the store", self._settings.file_sweep_interval, self._sweep_all, *passing)

    async def _sweep_all(self) -> int:
        return await self.sweep() + await self._outputs.sweep()

    async def sweep(self) -> int:
        """Remove old objects that no file has; return how many. What killed writers have left is removed, too.

        Raises the errors of the store and of the reader.
        """
        await self._store.remove_drafts(_FOLDER, datetime.now(UTC) - self._settings.file_sweep_age)
        removed, known_prefix = 0, ""
        named: frozenset[str] = frozenset()
        unnamed: list[str] = []
        strangers, stranger = 0, ""
        async for name in self._old_objects():
            if (found := _NAME.fullmatch(name)) is None:
                strangers, stranger = strangers + 1, name
                continue
            # The objects of a file mostly come together.
            prefix = name.rpartition("/")[0]
            if prefix != known_prefix:
                named, known_prefix = await self._named(found["tenant"], found["file_id"]), prefix
                await asyncio.sleep(_PAUSE_SECONDS)
            if name not in named:
                unnamed.append(name)
                removed += 1
            if len(unnamed) == _AT_ONCE:
                await self._store.delete(unnamed)
                unnamed = []
        await self._store.delete(unnamed)
        if strangers:
            _log.warning("%d objects are none of a file by their names, and stay, such as %s", strangers, stranger)
        return removed

    async def _old_objects(self) -> AsyncIterator[str]:
        async with aclosing(self._store.list(_FOLDER)) as objects:
            async for item in objects:
                if datetime.now(UTC) - item.modified > self._settings.file_sweep_age:
                    yield item.name

    async def _named(self, tenant: str, file_id: str) -> frozenset[str]:
        """Return the objects of a file. `tenant` is as in the names of objects."""
        workflow_id = file_workflow_id(file_id, "" if tenant == "-" else tenant)
        if await self._reader.find(workflow_id) is None:
            return frozenset()
        record = await self._reader.record_of(workflow_id)
        return frozenset(segment.name for segment in record.segments)


async def _remove_all(store: Store, prefix: str) -> None:
    found: list[str] = []
    async with aclosing(store.list(prefix)) as objects:
        async for item in objects:
            found.append(item.name)
    for at in range(0, len(found), _AT_ONCE):
        await store.delete(found[at : at + _AT_ONCE])
        if activity.in_activity():
            activity.heartbeat()
