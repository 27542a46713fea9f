"""Tokenized data sets in the store: shards of tokens under a key of their content, and a manifest that names them.

    training/datasets/<tenant, or ->/<key>/shards/<random name>
    training/datasets/<tenant, or ->/<key>/manifest/<size>-<SHA-256>/<random name>

The manifest is written last, so a data set with one is whole. The key is a hash of the documents' files and of the
tokenizer, so an equal one is found again. A shard has 32-bit little-endian integers.
"""

import hashlib
from array import array
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Final

from encryption import Unreadable
from llm_pb import internal_pb2
from store.store import MAX_PIECE_BYTES, ObjectDamaged, ObjectMissing, Store, StoredObject

TRAINING_FOLDER: Final = "training/"
SHARD_TOKENS: Final = 1024 * 1024
_MIN_PARTS: Final = 7


class Datasets:
    """The tokenized data sets of a tenant."""

    def __init__(self, store: Store, tenant: str, key: str) -> None:
        """`key` names the data set."""
        self._store = store.of_tenant(tenant)
        self._folder = f"{TRAINING_FOLDER}datasets/{tenant or '-'}/{key}/"

    async def find(self, max_age: timedelta) -> internal_pb2.TokenizedDataset | None:
        """Return the data set if it is in the store and not too old. Raises the errors of the store."""
        oldest = datetime.now(UTC) - max_age
        async with aclosing(self._store.list(f"{self._folder}manifest/")) as objects:
            async for item in objects:
                parts = item.name.split("/")
                if item.modified < oldest or len(parts) < _MIN_PARTS:
                    continue
                size, _, sha256 = parts[-2].partition("-")
                file = internal_pb2.StoredFile(object=item.name, size=int(size), sha256=bytes.fromhex(sha256))
                try:
                    content = await read_object(self._store, file)
                except (ObjectMissing, Unreadable):
                    # It was damaged, or is swept now. The tokens are made again.
                    continue
                return internal_pb2.TokenizedDataset.FromString(bytes(content))
        return None

    async def write_shard(self, tokens: "array[int]") -> internal_pb2.StoredFile:
        """Write one shard. Raises the errors of the store."""
        return await self._put("shards", tokens.tobytes())

    async def write_manifest(self, dataset: internal_pb2.TokenizedDataset) -> None:
        """Write the manifest, once all shards are written. Raises the errors of the store."""
        content = dataset.SerializeToString(deterministic=True)
        await self._put(f"manifest/{len(content)}-{hashlib.sha256(content).hexdigest()}", content)

    async def _put(self, folder: str, content: bytes) -> internal_pb2.StoredFile:
        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(content), MAX_PIECE_BYTES):
                yield content[at : at + MAX_PIECE_BYTES]

        stored = await self._store.put(self._store.new_name(f"{self._folder}{folder}/"), pieces())
        return internal_pb2.StoredFile(object=stored.name, size=stored.size, sha256=hashlib.sha256(content).digest())


async def read_object(
    store: Store, file: internal_pb2.StoredFile, progressed: Callable[[], object] = lambda: None
) -> bytearray:
    """Return the content of an object. Calls `progressed` for each piece.

    Raises ObjectDamaged for another content, the errors of the store.
    """
    content = bytearray()
    async with aclosing(store.read(StoredObject(file.object, file.size))) as pieces:
        async for piece in pieces:
            content += piece
            progressed()
    if hashlib.sha256(content).digest() != file.sha256:
        raise ObjectDamaged(f"the object {file.object} has another content than was written")
    return content


async def read_shards(
    store: Store, shards: Iterable[internal_pb2.StoredFile], progressed: Callable[[], object]
) -> bytearray:
    """Return the content of shards, joined. Like read_object."""
    content = bytearray()
    for shard in shards:
        content += await read_object(store, shard, progressed)
    return content
