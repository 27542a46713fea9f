"""The files of trained models, as objects of the store. The registry of trained models names them.

models/<tenant, or ->/<random name>
"""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Final

from jobs.ids import tenant_of
from llm_pb import internal_pb2
from store.store import MAX_PIECE_BYTES, ObjectDamaged, Store, StoredObject

MODELS_FOLDER: Final = "models/"
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(?:json|jinja|safetensors|txt|model)")
"""Files of a model that are loaded. None of them holds code, as a pickle would."""


def models_folder(tenant: str) -> str:
    """Return the prefix of the names of a tenant's models."""
    return f"{MODELS_FOLDER}{tenant or '-'}/"


async def put_file(store: Store, prefix: str, path: Path, progressed: Callable[[], object]) -> internal_pb2.StoredFile:
    """Write a file as a new object under a prefix. Calls `progressed` for each piece.

    Raises what Store.put raises, OSError.
    """
    sha256 = hashlib.sha256()

    async def pieces() -> AsyncIterator[bytes]:
        with path.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, MAX_PIECE_BYTES):
                sha256.update(piece)
                yield piece
                progressed()

    stored = await store.put(store.new_name(prefix), pieces())
    return internal_pb2.StoredFile(object=stored.name, size=stored.size, sha256=sha256.digest(), path=path.name)


async def get_file(
    store: Store, file: internal_pb2.StoredFile, path: Path, progressed: Callable[[], object] = lambda: None
) -> None:
    """Read an object into a file. Calls `progressed` for each piece.

    Raises ObjectDamaged for other content than was written; what Store.read raises.
    """
    sha256 = hashlib.sha256()
    with path.open("wb") as into:
        async with aclosing(store.read(StoredObject(file.object, file.size))) as pieces:
            async for piece in pieces:
                sha256.update(piece)
                await asyncio.to_thread(into.write, piece)
                progressed()
    if sha256.digest() != file.sha256:
        raise ObjectDamaged(f"the object {file.object} has another content than was written")


async def put_model(
    store: Store, pipeline_id: str, folder: Path, progressed: Callable[[], object]
) -> list[internal_pb2.StoredFile]:
    """Write the files of a model that a pipeline has trained. Like put_file."""
    tenant = tenant_of(pipeline_id)
    store = store.of_tenant(tenant)
    names = sorted(name for name in await asyncio.to_thread(os.listdir, folder) if _FILE_NAME.fullmatch(name))
    return [await put_file(store, models_folder(tenant), folder / name, progressed) for name in names]


async def get_model(
    store: Store,
    files: Iterable[internal_pb2.StoredFile],
    folder: Path,
    progressed: Callable[[], object] = lambda: None,
) -> None:
    """Read the files of a model into a folder. Like get_file. Raises ValueError for a file that no model has."""
    for file in files:
        if _FILE_NAME.fullmatch(file.path) is None:
            raise ValueError(f"no model has a file {file.path!r}")
        await get_file(store, file, folder / file.path, progressed)
