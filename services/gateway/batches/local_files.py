"""Objects of the store as temporary files without a name, in which the lines and results of a batch are read.

Their content is in clear on the machine's disk until the process ends.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from tempfile import TemporaryFile
from typing import IO, Final

from llm_pb import common_pb2
from store.store import MAX_PIECE_BYTES, Store, StoredObject

JSONL: Final = "application/jsonl"


def stored(ref: common_pb2.FileRef) -> StoredObject:
    """Return the object that a reference within a batch names."""
    return StoredObject(ref.file_id, ref.size_bytes)


async def fetch(store: Store, objects: Iterable[StoredObject], most: int | None = None) -> IO[bytes]:
    """Return the content of objects as one file at its beginning. With `most`, its end beyond so many bytes is missing.

    The caller closes it. Raises the errors of the store.
    """
    file, size = TemporaryFile(), 0  # noqa: SIM115  # the caller closes it
    try:
        for item in objects:
            async with aclosing(store.read(item)) as pieces:
                async for piece in pieces:
                    await asyncio.to_thread(file.write, piece)
                    size += len(piece)
                    if most is not None and size > most:
                        file.seek(0)
                        return file
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


async def put(store: Store, prefix: str, file: IO[bytes], media_type: str = "") -> common_pb2.FileRef:
    """Write a file from its beginning to the store, and return the object. Raises the errors of the store."""
    sha256 = hashlib.sha256()
    file.seek(0)

    async def pieces() -> AsyncGenerator[bytes, None]:
        while piece := await asyncio.to_thread(file.read, MAX_PIECE_BYTES):
            sha256.update(piece)
            yield piece

    async with aclosing(pieces()) as coming:
        written = await store.put(store.new_name(prefix), coming)
    return common_pb2.FileRef(
        file_id=written.name, sha256=sha256.digest(), size_bytes=written.size, media_type=media_type
    )


def pieces_of(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of a file from its beginning."""
    file.seek(0)
    while piece := file.read(MAX_PIECE_BYTES):
        yield piece
