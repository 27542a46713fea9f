"""The encrypted store: a Store around another one. An object whose name has no ENDING is in clear."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from datetime import datetime
from typing import Final

from encryption import Encryption, KeysUnavailable
from encryption.chunks import CHUNK_BYTES, HEADER_BYTES, STORED_CHUNK_BYTES, ChunkCipher, Header, stored_size
from store.objects import open_objects
from store.settings import StoreSettings
from store.store import ListedObject, Store, StoredObject, random_name

ENDING: Final = ".enc"
"""The end of the name of an encrypted object. The name decides, because content in clear may begin with any bytes."""


def open_store(settings: StoreSettings, encryption: Encryption | None) -> Store | None:
    """Return the store of the settings, None where they have none. Raises StoreUnavailable, OSError: see open_objects.

    New objects are encrypted unless `encryption` is None or does not write.
    """
    return None if settings.url is None else EncryptedStore(open_objects(settings), encryption)


class EncryptedStore:
    """A Store whose objects are encrypted with a tenant's data keys.

    The store sees the size of each object, its time, its tenant and its name. Its methods raise Unreadable (KeyDeleted)
    for content that can never be decrypted again, and KeysUnavailable, in addition to what Store says.
    """

    def __init__(self, store: Store, encryption: Encryption | None, tenant: str = "") -> None:
        self._store = store
        self._encryption = encryption
        self._tenant = tenant

    def of_tenant(self, tenant: str) -> "EncryptedStore":
        """See Store."""
        return self if tenant == self._tenant else EncryptedStore(self._store, self._encryption, tenant)

    def new_name(self, prefix: str) -> str:
        """See Store."""
        return random_name(prefix, ENDING if self._encryption is not None and self._encryption.write else "")

    async def put(self, name: str, pieces: AsyncIterator[bytes]) -> StoredObject:
        """See Store."""
        if not name.endswith(ENDING):
            return await self._store.put(name, pieces)
        key = await self._keys_of(name).keys.current(self._tenant)
        header = Header.new(key.key_id)
        cipher, size = ChunkCipher(key, header, name), 0

        async def encrypted() -> AsyncGenerator[bytes, None]:
            nonlocal size
            yield header.encode()
            index, rest = 0, bytearray()
            async for piece in pieces:
                size += len(piece)
                rest += piece
                # The last chunk is known as such only at the end, so one is always kept.
                while len(rest) > CHUNK_BYTES:
                    yield cipher.encrypt(index, bytes(rest[:CHUNK_BYTES]), last=False)
                    del rest[:CHUNK_BYTES]
                    index += 1
            yield cipher.encrypt(index, bytes(rest), last=True)

        async with aclosing(encrypted()) as chunks:
            await self._store.put(name, chunks)
        return StoredObject(name, size)

    async def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """See Store."""
        if not stored.name.endswith(ENDING):
            async with aclosing(self._store.read(stored, start, end)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        end = stored.size if end is None else min(end, stored.size)
        if start >= end and (start or stored.size):
            return
        encryption = self._keys_of(stored.name)
        whole = StoredObject(stored.name, HEADER_BYTES + stored_size(stored.size))
        header = Header.decode(b"".join([piece async for piece in self._store.read(whole, 0, HEADER_BYTES)]))
        key = await encryption.keys.get(header.key_id)
        cipher = ChunkCipher(key, header, stored.name)
        last = max(-(-stored.size // CHUNK_BYTES), 1) - 1
        first = start // CHUNK_BYTES
        until = last if not stored.size else (end - 1) // CHUNK_BYTES
        begin, finish = (HEADER_BYTES + index * STORED_CHUNK_BYTES for index in (first, until + 1))
        index, rest = first, bytearray()
        async with aclosing(self._store.read(whole, begin, finish)) as pieces:
            async for piece in pieces:
                rest += piece
                content = bytearray()
                while len(rest) >= STORED_CHUNK_BYTES and index < until:
                    content += cipher.decrypt(index, bytes(rest[:STORED_CHUNK_BYTES]), last=False)
                    del rest[:STORED_CHUNK_BYTES]
                    index += 1
                if content:
                    yield _cut(content, start, end, index * CHUNK_BYTES - len(content))
        content = bytearray(cipher.decrypt(until, bytes(rest), last=until == last))
        if content:
            yield _cut(content, start, end, until * CHUNK_BYTES)

    async def delete(self, names: Iterable[str]) -> None:
        """See Store."""
        await self._store.delete(names)

    async def list(self, prefix: str) -> AsyncGenerator[ListedObject, None]:
        """See Store."""
        async with aclosing(self._store.list(prefix)) as objects:
            async for item in objects:
                yield item

    async def remove_drafts(self, prefix: str, before: datetime) -> None:
        """See Store."""
        await self._store.remove_drafts(prefix, before)

    def _keys_of(self, name: str) -> Encryption:
        if self._encryption is None:
            raise KeysUnavailable(f"the object {name} is encrypted, and ENCRYPTION_KEY_STORE is not set")
        return self._encryption


def _cut(content: bytearray, start: int, end: int, offset: int) -> bytes:
    """Return of the content, which lies at the offset, what is between start and end."""
    return bytes(content[max(start - offset, 0) : max(end - offset, 0)])
