"""The data keys of tenants, unwrapped and kept in memory while their files are in the key store."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from encryption.cipher import KEY_BYTES, DataKey, KeyId
from encryption.errors import KeyDeleted, KeysUnavailable
from encryption.key_store import KeyStore, WrappedKey
from encryption.key_wrapper import KeyWrapper

RECHECK: Final = timedelta(seconds=5)
"""How often a key in memory is looked up in the store: how long at most a deleted key is used."""
_SPREADING: Final = timedelta(minutes=1)
"""How long a new key may be unseen elsewhere: network file systems remember for a while that a file was not there."""


class _Kept(NamedTuple):
    key: DataKey
    stored: WrappedKey
    checked_at: float


def _now() -> datetime:
    return datetime.now(UTC)


class DataKeys:
    """One process's view of the keys. For one event loop."""

    def __init__(self, store: KeyStore, wrapper: KeyWrapper, clock: Callable[[], datetime] = _now) -> None:
        self._store = store
        self._wrapper = wrapper
        self._clock = clock
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._loading = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    async def current(self, tenant: str) -> DataKey:
        """Return the tenant's key of this month; make it when there is none. Raises KeysUnavailable."""
        now = self._clock()
        month = f"{now:%Y-%m}"
        if (kept := self._fresh(tenant, month)) is not None:
            return kept
        async with self._loading:
            key = self._fresh(tenant, month) or await self._load(tenant, month)
            if key is not None:
                return key
            key_id, secret = KeyId.new(tenant, now), os.urandom(KEY_BYTES)
            wrapped = await self._wrapper.wrap(secret, str(key_id))
            stored = await asyncio.to_thread(self._store.add, key_id, wrapped)
            return await self._keep(tenant, month, stored)

    async def get(self, key_id: KeyId) -> DataKey:
        """Return the key that a ciphertext names.

        Raises KeyDeleted when the key was deleted, KeysUnavailable when it cannot be had now.
        """
        if (fresh := self._fresh(key_id.tenant, key_id.month)) is not None and fresh.key_id == key_id:
            return fresh
        async with self._loading:
            key = await self._load(key_id.tenant, key_id.month)
        if key is not None and key.key_id == key_id:
            return key
        if key is None and abs(self._clock() - key_id.made_at) < _SPREADING:
            raise KeysUnavailable(f"the data key {key_id} is not in the key store yet, or was deleted")
        raise KeyDeleted(f"the data key {key_id} is not in the key store: it was deleted, with all that it encrypted")

    def cached(self, key_id: KeyId) -> DataKey | None:
        """Return the key if it is in memory; look it up in the store meanwhile, if that was not done a moment ago."""
        kept = self._kept.get((key_id.tenant, key_id.month))
        if kept is None or kept.key.key_id != key_id:
            return None
        if self._fresh(key_id.tenant, key_id.month) is None and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look(key_id))
        return kept.key

    async def _look(self, key_id: KeyId) -> None:
        # It is in memory still, or was deleted: whoever needs it next finds out.
        with contextlib.suppress(KeysUnavailable, KeyDeleted):
            await self.get(key_id)

    def _fresh(self, tenant: str, month: str) -> DataKey | None:
        kept = self._kept.get((tenant, month))
        if kept is None or time.monotonic() - kept.checked_at > RECHECK.total_seconds():
            return None
        return kept.key

    async def _load(self, tenant: str, month: str) -> DataKey | None:
        """Return the key as the store has it now, None when it has none."""
        kept = self._kept.get((tenant, month))
        try:
            stored = await asyncio.to_thread(self._store.read, tenant, month)
        except KeysUnavailable:
            if kept is None:
                raise
            # Work goes on while the volume is away: a deletion is not what it says.
            stored = kept.stored
        if stored is None:
            self._kept.pop((tenant, month), None)
            return None
        return await self._keep(tenant, month, stored)

    async def _keep(self, tenant: str, month: str, stored: WrappedKey) -> DataKey:
        kept = self._kept.get((tenant, month))
        if kept is not None and kept.stored.name == stored.name:
            key = kept.key
        else:
            key_id = KeyId(tenant, stored.name)
            key = DataKey(key_id, await self._wrapper.unwrap(stored.wrapped, str(key_id)))
        self._kept[tenant, month] = _Kept(key, stored, time.monotonic())
        return key
