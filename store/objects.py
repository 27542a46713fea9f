"""The store by the library `obstore`, which only this module imports: a folder, or a bucket behind the S3 API."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from store import folders
from store.settings import StoreSettings
from store.store import (
    MAX_PIECE_BYTES,
    ListedObject,
    ObjectDamaged,
    ObjectMissing,
    StoredObject,
    StoreUnavailable,
    random_name,
)

_PART_BYTES: Final = 5 * 1024 * 1024
"""Size of the parts in which a large object is sent: the least that S3 accepts. A smaller object is sent at once."""
_PARTS_IN_FLIGHT: Final = 2
_RETRIES: Final = 5
_READ_ATTEMPTS: Final = 3
"""Attempts of a read that has not gone further."""
_RETRY_SECONDS: Final = 0.2
_DELETED_AT_ONCE: Final = 1000
_LISTED_AT_ONCE: Final = 1000
_NO_BUCKET: Final = "NoSuchBucket"

_T = TypeVar("_T")


class ObjectStore:
    """A Store in a folder or a bucket. For one event loop."""

    def __init__(self, store: LocalStore | S3Store, timeout: timedelta, folder: Path | None = None) -> None:
        """`folder` is that of a LocalStore, whose objects are synced to disk."""
        self._store = store
        self._seconds = timeout.total_seconds()
        self._folder = folder
        self._inode = None if folder is None else _inode(folder)

    def of_tenant(self, tenant: str) -> "ObjectStore":
        """See Store."""
        return self

    def new_name(self, prefix: str) -> str:
        """See Store."""
        return random_name(prefix)

    async def put(self, name: str, pieces: AsyncIterator[bytes]) -> StoredObject:
        """See Store."""
        await self._require_folder()
        try:
            size = await self._put(name, pieces)
            if self._folder is not None:
                await self._answer(asyncio.to_thread(folders.sync, self._folder, name))
        except ObjectMissing as error:
            raise StoreUnavailable(f"the store takes no objects: {error}") from None
        return StoredObject(name, size)

    async def _put(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        head = bytearray()
        async for piece in pieces:
            head += piece
            if len(head) > _PART_BYTES:
                return await self._put_parts(name, bytes(head), pieces)
        await self._answer(obstore.put_async(self._store, name, bytes(head), use_multipart=False))
        return len(head)

    async def _put_parts(self, name: str, head: bytes, pieces: AsyncIterator[bytes]) -> int:
        """Write the head and the pieces; return how many bytes they are."""
        waiting: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(1)

        async def queued() -> AsyncGenerator[bytes, None]:
            # The library reads the pieces in a task of its own. It must not read on after the call was cancelled.
            while (piece := await waiting.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece

        putting = asyncio.ensure_future(
            obstore.put_async(
                self._store,
                name,
                queued(),
                use_multipart=True,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_IN_FLIGHT,
            )
        )
        try:
            size = len(head)
            await self._hand_over(waiting, head, putting)
            async for piece in pieces:
                size += len(piece)
                await self._hand_over(waiting, piece, putting)
            await self._hand_over(waiting, None, putting)
            await self._answer(asyncio.shield(putting))
        except BaseException:
            # The library takes back the parts that were sent when the pieces end with an error.
            with suppress(Exception):
                async with asyncio.timeout(self._seconds):
                    await waiting.put(_GivenUpError())
                    await asyncio.wait({putting})
            putting.cancel()
            raise
        return size

    async def _hand_over(
        self, waiting: "asyncio.Queue[bytes | Exception | None]", piece: bytes | None, putting: "asyncio.Future[Any]"
    ) -> None:
        """Wait until the store has room for the piece. Raises StoreUnavailable when it has failed meanwhile."""
        handing = asyncio.ensure_future(waiting.put(piece))
        try:
            await asyncio.wait({handing, putting}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if putting.done():
                await self._answer(putting)
            if not handing.done():
                raise StoreUnavailable(f"the store has not taken what was sent within {self._seconds:g} s")
        finally:
            handing.cancel()

    async def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """See Store."""
        end = stored.size if end is None else min(end, stored.size)
        failures, until = 0, self._limit()
        while start < end:
            try:
                async with aclosing(self._read_once(stored, start, end, until)) as pieces:
                    async for piece in pieces:
                        yield piece
                        start += len(piece)
                        failures, until = 0, self._limit()
                if start < end:
                    raise StoreUnavailable(f"the object {stored.name} ends at byte {start}, before byte {end}")
            except StoreUnavailable:
                # A store that has been silent for all of its time tells no size either.
                if asyncio.get_running_loop().time() >= until:
                    raise
                await self._require_size(stored, until)
                failures += 1
                if failures == _READ_ATTEMPTS:
                    raise
                await asyncio.sleep(_RETRY_SECONDS * failures)

    async def _require_size(self, stored: StoredObject, until: float) -> None:
        """Raise ObjectDamaged for an object that is too short, and return where the size is not known by `until`."""
        # Whether the object is missing, or the folder or bucket that it is in, the next read tells.
        size = stored.size
        with suppress(StoreUnavailable, ObjectMissing):
            size = (await self._answer(obstore.head_async(self._store, stored.name), until))["size"]
        if size < stored.size:
            raise ObjectDamaged(f"the object {stored.name} has {size} bytes, not {stored.size}")

    async def _read_once(self, stored: StoredObject, start: int, end: int, until: float) -> AsyncGenerator[bytes, None]:
        """Yield what comes. `until` is the limit of the first piece; each further one has as long as an answer."""
        # Not every server answers a range that is the whole object as a range.
        options: Any = None if (start, end) == (0, stored.size) else {"range": (start, end)}
        try:
            found = await self._answer(obstore.get_async(self._store, stored.name, options=options), until)
        except ObjectMissing:
            await self._require_folder()
            raise
        coming = found.stream(min_chunk_size=MAX_PIECE_BYTES)
        while start < end and (chunk := await self._answer(anext(coming, None), until)) is not None:
            data = memoryview(chunk)[: end - start]
            start += len(data)
            for at in range(0, len(data), MAX_PIECE_BYTES):
                yield bytes(data[at : at + MAX_PIECE_BYTES])
            until = self._limit()

    async def delete(self, names: Iterable[str]) -> None:
        """See Store."""
        await self._require_folder()
        if self._folder is None:
            all_names = list(names)
            for at in range(0, len(all_names), _DELETED_AT_ONCE):
                await self._answer(obstore.delete_async(self._store, all_names[at : at + _DELETED_AT_ONCE]))
            return
        for name in names:
            # The library stops at the first file that is not there.
            with suppress(ObjectMissing):
                await self._answer(obstore.delete_async(self._store, name))

    async def list(self, prefix: str) -> AsyncGenerator[ListedObject, None]:
        """See Store."""
        await self._require_folder()
        with _errors():
            coming = obstore.list(self._store, prefix, chunk_size=_LISTED_AT_ONCE)
        while (found := await self._answer(anext(coming, None))) is not None:
            for item in found:
                yield ListedObject(item["path"], item["last_modified"])

    async def remove_drafts(self, prefix: str, before: datetime) -> None:
        """See Store."""
        if self._folder is not None:
            await self._require_folder()
            with _errors():
                # It may take long where there are many objects, so it has no timeout.
                await asyncio.to_thread(folders.remove_drafts, self._folder / prefix, before.timestamp())

    def _limit(self) -> float:
        """Return the time, by the loop's clock, until which an answer that is asked for now may take."""
        return asyncio.get_running_loop().time() + self._seconds

    async def _answer(self, asked: Awaitable[_T], until: float | None = None) -> _T:
        """Return what the store answers by `until`, or within its timeout. Raises StoreUnavailable, ObjectMissing."""
        with _errors():
            async with asyncio.timeout_at(self._limit() if until is None else until):
                return await asked

    async def _require_folder(self) -> None:
        """Raise StoreUnavailable when the folder is not mounted. Another process may have created an empty one."""
        if self._folder is not None and await self._answer(asyncio.to_thread(_inode, self._folder)) != self._inode:
            raise StoreUnavailable(f"the folder {self._folder} of the store is not there, or is another one")


class _GivenUpError(Exception):
    """The writer of an object has given up."""


@contextmanager
def _errors() -> Iterator[None]:
    """Raise what the library raises as an error of the store."""
    try:
        yield
    except FileNotFoundError as error:
        if _NO_BUCKET in str(error):
            raise StoreUnavailable("the bucket of the store is not there") from None
        raise ObjectMissing(_line(error)) from None
    except TimeoutError:
        raise StoreUnavailable("the store has not answered in time") from None
    except (BaseError, OSError) as error:
        raise StoreUnavailable(f"the store fails: {_line(error)}") from None


def _create(folder: Path) -> None:
    """Create the folder, and none above it: under a volume that is not mounted a new store would hide the real one."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        raise StoreUnavailable(
            f"STORE_URL: the folder {folder.parent} is not there: mount its volume, or create the folder"
        ) from None


def _inode(folder: Path) -> int | None:
    return folder.stat().st_ino if folder.is_dir() else None


def _line(error: Exception) -> str:
    """Return the first line of a message, without the body of an answer: that may name the access key."""
    return next(iter(str(error).splitlines()), type(error).__name__).partition(": <")[0]


def open_objects(settings: StoreSettings) -> ObjectStore:
    """Return the store of the settings, whose URL is set. Does not wait for a server.

    Raises StoreUnavailable for a folder that cannot be created, OSError for a file of the secret that cannot be read.
    """
    with _errors():
        if (folder := settings.folder) is not None:
            _create(folder)
            return ObjectStore(LocalStore(folder, automatic_cleanup=True), settings.timeout, folder)
        config: dict[str, Any] = {"region": settings.region}
        if settings.endpoint is not None:
            config["endpoint"] = settings.endpoint
        if settings.access_key_id is not None and (secret := settings.secret) is not None:
            config["access_key_id"] = settings.access_key_id.get_secret_value()
            config["secret_access_key"] = secret.get_secret_value()
        bucket = S3Store.from_url(
            settings.url or "",
            config=config,  # type: ignore[arg-type]  # its fields are those above
            client_options={
                "allow_http": settings.endpoint is not None and settings.endpoint.startswith("http://"),
                "connect_timeout": min(settings.timeout, timedelta(seconds=5)),
                "timeout": settings.timeout,
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": settings.timeout,
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
        return ObjectStore(bucket, settings.timeout)
