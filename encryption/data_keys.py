"""The data keys of tenants, unwrapped and kept in memory.

A key in memory is looked up in the store every few seconds, because it may have been deleted. While the store, or the
service that unwraps, is away or hangs, keys in memory stay in use: an outage is no deletion.
"""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar

from encryption.cipher import KEY_BYTES, Ciphers, DataKey, KeyId
from encryption.errors import DamagedKey, KeyDeleted, KeysUnavailable
from encryption.key_store import KeyStore, Slot, WrappedKey
from encryption.key_wrapper import KeyWrapper

RECHECK: Final = timedelta(seconds=5)
"""Interval at which a key in memory is looked up in the store, and the longest use of a deleted key."""
_PATIENCE: Final = timedelta(seconds=2)
"""Maximum wait for one look-up. It goes on in the background."""
_GLANCE: Final = timedelta(seconds=1)
"""Maximum wait for a look at the store that nobody's work waits for."""
_PAUSE: Final = timedelta(seconds=1)
"""Pause after a look-up that failed."""
_RECENT: Final = timedelta(minutes=1)
"""Time for which `problem` tells of a failed look-up."""
_THREADS: Final = 8
"""Threads that read the key store. They are not the process's, because a network file system may block them all."""

_T = TypeVar("_T")


@dataclass
class _Cached:
    key: DataKey
    stored: WrappedKey
    checked_at: float
    lost: bool = False
    """Whether the store is there and the key is not, although nobody deleted it: what it encrypts now may be lost."""


class _Failure(NamedTuple):
    at: float
    error: KeysUnavailable


class _LookUp(NamedTuple):
    began_at: float
    task: "asyncio.Task[DataKey | KeysUnavailable | None]"


def _now() -> datetime:
    return datetime.now(UTC)


class DataKeys:
    """The keys as one process sees them. For one event loop."""

    def __init__(
        self,
        store: KeyStore,
        wrapper: KeyWrapper,
        clock: Callable[[], datetime] = _now,
        *,
        recheck: timedelta = RECHECK,
    ) -> None:
        self._store = store
        self._wrapper = wrapper
        self._clock = clock
        self._recheck = recheck
        self._ciphers = Ciphers()
        self._cached: dict[Slot, _Cached] = {}
        self._look_ups: dict[Slot, _LookUp] = {}
        self._failures: dict[Slot, _Failure] = {}
        self._lacking: tuple[KeyId, _Failure] | None = None
        """The last key that was asked for and that the store does not have."""
        self._mark: str | None = None
        """The mark of the store of which the first key was taken."""
        self._glance: asyncio.Task[str | None] | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "key-store")

    @property
    def problem(self) -> str | None:
        """Why a key was unavailable within the last minute, by the latest failure. None if none was."""
        failures = [*self._failed_lately(_RECENT).values()]
        if self._lacking is not None and self._lacking[1].at > time.monotonic() - _RECENT.total_seconds():
            failures.append(self._lacking[1])
        return str(max(failures, key=lambda failure: failure.at).error) if failures else None

    async def present_problem(self) -> str | None:
        """Return `problem`, or why a service that started now could not have the keys. Takes a second at most.

        Makes no key, and takes none into memory. A key service, which is paid by the call, is not asked.
        """
        # One look at a time: a network file system may hang.
        if self._glance is None or self._glance.done():
            self._glance = asyncio.create_task(self._glanced())
        await asyncio.wait([self._glance], timeout=_GLANCE.total_seconds())
        return self.problem or (self._glance.result() if self._glance.done() else "the key store does not answer")

    async def _glanced(self) -> str | None:
        try:
            await self._recheck_failures()
            if self._cached:
                slot, cached = max(self._cached.items(), key=lambda item: item[1].checked_at)
                stored = await self._in_thread(self._store.read, slot)
                if loss := await self._loss(cached, stored):
                    return loss
                if stored is not None and not self._wrapper.is_paid:
                    await self._wrapper.unwrap(stored.wrapped, str(KeyId(slot.tenant, stored.name)))
            elif not self._wrapper.is_paid:
                await self.require_fit()
        except KeysUnavailable as error:
            return str(error)
        except OSError as error:
            return f"the key store cannot be read: {error}"
        return None

    async def require_fit(self) -> None:
        """Raise KeysUnavailable if the store has keys and the wrapper unwraps none: it is that of another store.

        Takes none into memory. Raises OSError where the store cannot be read.
        """
        problem: KeysUnavailable | None = None
        for slot in await self._in_thread(self._store.slots):
            try:
                if (stored := await self._in_thread(self._store.read, slot)) is not None:
                    await self._wrapper.unwrap(stored.wrapped, str(KeyId(slot.tenant, stored.name)))
                    return
            except KeysUnavailable as error:
                # A single file may be damaged. Whoever needs its key says so.
                problem = error
        if problem is not None:
            raise problem

    async def _recheck_failures(self) -> None:
        """Forget what has failed lately and would not now. Raises KeysUnavailable for what still fails."""
        if self._lacking is not None and not await self.lacks(self._lacking[0]):
            self._lacking = None
        for slot, failure in self._failed_lately(_RECENT).items():
            stored = await self._in_thread(self._store.read, slot)
            # A key that is still to be made shows nothing.
            if stored is None or self._wrapper.is_paid:
                continue
            await self._wrapper.unwrap(stored.wrapped, str(KeyId(slot.tenant, stored.name)))
            cached = self._cached.get(slot)
            is_lost = cached is not None and await self._loss(cached, stored)
            if not is_lost and self._failures.get(slot) is failure:
                del self._failures[slot]

    async def lacks(self, key_id: KeyId) -> bool:
        """Return whether the store neither has the key nor knows that it was deleted. Raises KeysUnavailable.

        A file that is damaged may hold it, and no other key is made in its place.
        """
        try:
            stored = await self._in_thread(self._store.read, Slot.of_month(key_id.tenant, key_id.month))
        except DamagedKey:
            return False
        if stored is not None and stored.name == key_id.name:
            return False
        return not await self._in_thread(self._store.is_deleted, key_id)

    async def current(self, tenant: str) -> DataKey:
        """Return the tenant's key of this month, creating it if there is none. Raises KeysUnavailable.

        While that key is unavailable, the latest one in memory takes its place.
        """
        slot = Slot.of_month(tenant, f"{self._clock():%Y-%m}")
        try:
            return await self._created(slot)
        except KeysUnavailable:
            earlier = [item for item in self._cached if item.tenant == tenant and item.encrypts and item != slot]
            if not earlier or (key := await self._key(max(earlier))) is None:
                raise
            return key

    async def get(self, key_id: KeyId) -> DataKey:
        """Return the key of a ciphertext. Raises KeyDeleted, KeysUnavailable."""
        slot = Slot.of_month(key_id.tenant, key_id.month)
        try:
            key = await self._key(slot)
        except KeysUnavailable:
            # A lost key is good enough to decrypt.
            cached = self._cached.get(slot)
            key = cached.key if cached is not None else None
            if key is None or key.key_id != key_id:
                raise
        if key is not None and key.key_id == key_id:
            return key
        if await self._in_thread(self._store.is_deleted, key_id):
            raise KeyDeleted(f"the data key {key_id} was deleted")
        lacking = KeysUnavailable(f"the data key {key_id} is not in the key store")
        self._lacking = key_id, _Failure(time.monotonic(), lacking)
        raise lacking

    async def search_key(self, tenant: str, *, create: bool) -> DataKey | None:
        """Return the tenant's key of search attributes; None when there is none and `create` is False.

        Raises KeysUnavailable.
        """
        slot = Slot.of_search(tenant)
        return await self._created(slot) if create else await self._key(slot)

    def cached(self, key_id: KeyId) -> DataKey | None:
        """Return the key if it is in memory. Looks it up in the store in the background, if that is due."""
        slot = Slot.of_month(key_id.tenant, key_id.month)
        cached = self._cached.get(slot)
        if cached is None or cached.key.key_id != key_id:
            return None
        if self._fresh(slot) is None and slot not in self._failed_lately():
            self._begin(slot, create=False)
        return cached.key

    async def _created(self, slot: Slot) -> DataKey:
        while (key := await self._key(slot, create=True)) is None:
            # Another caller's look-up, which does not create keys, was under way.
            pass
        return key

    async def _key(self, slot: Slot, *, create: bool = False) -> DataKey | None:
        """Return the key, as the store has it or had it a moment ago; None when it has none. Raises KeysUnavailable."""
        if (key := self._fresh(slot)) is not None:
            return key
        found: DataKey | KeysUnavailable | None
        if (failure := self._failed_lately().get(slot)) is not None:
            found = failure.error
        else:
            look_up = self._begin(slot, create=create)
            left = look_up.began_at + _PATIENCE.total_seconds() - time.monotonic()
            # Unlike wait_for, this leaves the task to the other callers.
            await asyncio.wait([look_up.task], timeout=max(left, 0))
            found = look_up.task.result() if look_up.task.done() else KeysUnavailable("a data key is looked up")
        if not isinstance(found, KeysUnavailable):
            return found
        cached = self._cached.get(slot)
        if cached is None or cached.lost:
            raise found
        return cached.key

    def _begin(self, slot: Slot, *, create: bool) -> _LookUp:
        """Return the running look-up of the key. Starts one if there is none."""
        look_up = self._look_ups.get(slot)
        if look_up is None:
            look_up = _LookUp(time.monotonic(), asyncio.create_task(self._look_up(slot, create=create)))
            self._look_ups[slot] = look_up
        return look_up

    async def _look_up(self, slot: Slot, *, create: bool) -> DataKey | KeysUnavailable | None:
        try:
            key = await self._read(slot, create=create)
        except KeysUnavailable as error:
            self._failures = {**self._failed_lately(_RECENT), slot: _Failure(time.monotonic(), error)}
            return error
        else:
            self._failures.pop(slot, None)
            return key
        finally:
            del self._look_ups[slot]

    async def _read(self, slot: Slot, *, create: bool) -> DataKey | None:
        cached = self._cached.get(slot)
        stored = await self._in_thread(self._store.read, slot)
        if cached is not None and (loss := await self._loss(cached, stored)):
            cached.lost = True
            raise KeysUnavailable(loss)
        if cached is not None and (stored is None or stored.name != cached.stored.name):
            # It was deleted.
            del self._cached[slot]
            cached = None
        makes = stored is None and create
        mark = await self._in_thread(self._store.mark) if makes or self._mark is None else self._mark
        if makes:
            if self._mark not in (None, mark):
                raise KeysUnavailable(f"the key store is another one than before: it has the mark {mark!r}")
            key_id = KeyId.new(slot.tenant, self._clock())
            if slot.encrypts and key_id.month != slot.name:
                raise KeysUnavailable("the month has just ended")
            wrapped = await self._wrapper.wrap(os.urandom(KEY_BYTES), str(key_id))
            stored = await self._in_thread(self._store.add, slot, WrappedKey(name=key_id.name, wrapped=wrapped))
        if stored is None:
            return None
        if cached is not None:
            key = cached.key
        else:
            key_id = KeyId(slot.tenant, stored.name)
            secret = await self._wrapper.unwrap(stored.wrapped, str(key_id))
            key = DataKey(key_id, secret, self._ciphers)
        self._cached[slot] = _Cached(key, stored, time.monotonic())
        self._mark = mark
        return key

    async def _loss(self, cached: _Cached, stored: WrappedKey | None) -> str:
        """Return how the store has lost a key that is in memory. Empty if it has the key, or the key was deleted."""
        if stored is not None and stored.name == cached.stored.name:
            return ""
        if await self._in_thread(self._store.is_deleted, cached.key.key_id):
            return ""
        found = "" if stored is None else f", which has {stored.name}: another one is mounted"
        return f"the data key {cached.key.key_id} is not in the key store any more{found}"

    def _fresh(self, slot: Slot) -> DataKey | None:
        cached = self._cached.get(slot)
        if cached is None or cached.lost or time.monotonic() - cached.checked_at > self._recheck.total_seconds():
            return None
        return cached.key

    def _failed_lately(self, within: timedelta = _PAUSE) -> dict[Slot, _Failure]:
        since = time.monotonic() - within.total_seconds()
        return {slot: failure for slot, failure in self._failures.items() if failure.at > since}

    async def _in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
