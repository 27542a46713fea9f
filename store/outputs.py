"""The outputs of jobs that are too large for a message, and images, as objects of the store.

The record of such a file is the job: it exists for others once a result in Temporal names its id. An object's name
tells its job, so that a reader finds out who may see it, a deletion finds all objects of a job, and the sweeper finds
those that no result names: an attempt that is lost, or whose result comes too late, leaves such an object.

    outputs/<tenant, or ->/<hash of the job's id>/<random>/<the job's id in base64url>/<random name>
             the two halves of the file's id ──┴──────┴
"""

import base64
import hashlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from datetime import datetime
from typing import Final, NamedTuple

from jobs.ids import OUTPUT_ID_PREFIX, tenant_of
from llm_pb import common_pb2
from store.store import MAX_PIECE_BYTES, ObjectMissing, Store, StoredObject

TEXT: Final = "text/plain; charset=utf-8"
_FOLDER: Final = "outputs/"
_HALF: Final = 32
"""Hexadecimal digits in each half of an id."""
_MAX_FOLDER: Final = 200
"""Maximum length of a folder's name. A file system takes 255 characters."""
_MIN_PARTS: Final = 6
_AT_ONCE: Final = 100


class OutputObject(NamedTuple):
    """An object that holds an output, as its name tells it."""

    name: str
    file_id: str
    job_id: str
    """The workflow id of the job."""


async def write_output(
    store: Store, job_id: str, content: bytes | bytearray, media_type: str = TEXT
) -> common_pb2.FileRef:
    """Write an output of a job as a new object; return the file. The job's id tells the tenant.

    Raises what Store.put raises.
    """
    nonce, sha256, data = secrets.token_hex(_HALF // 2), hashlib.sha256(), memoryview(content)
    store = store.of_tenant(tenant_of(job_id))

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), MAX_PIECE_BYTES):
            piece = bytes(data[at : at + MAX_PIECE_BYTES])
            sha256.update(piece)
            yield piece

    name = base64.urlsafe_b64encode(job_id.encode()).decode()
    folders = [name[at : at + _MAX_FOLDER] for at in range(0, len(name), _MAX_FOLDER)]
    stored = await store.put(store.new_name(f"{_of_job(job_id)}{nonce}/{'/'.join(folders)}/"), pieces())
    return common_pb2.FileRef(
        file_id=f"{OUTPUT_ID_PREFIX}{_hash(job_id)}{nonce}",
        sha256=sha256.digest(),
        size_bytes=stored.size,
        media_type=media_type,
    )


async def find_output(store: Store, tenant: str, file_id: str) -> OutputObject | None:
    """Return the object of a file, by its id; None if there is none. Raises StoreUnavailable."""
    digits = file_id.removeprefix(OUTPUT_ID_PREFIX)
    prefix = f"{_FOLDER}{tenant or '-'}/{digits[:_HALF]}/{digits[_HALF:]}/"
    async with aclosing(store.list(prefix)) as objects:
        async for item in objects:
            return parsed_name(item.name)
    return None


async def stored_output(store: Store, job_id: str, ref: common_pb2.FileRef) -> StoredObject:
    """Return the object of a file that the result of a job names. Raises StoreUnavailable, ObjectMissing."""
    found = await find_output(store, tenant_of(job_id), ref.file_id)
    if found is None or found.job_id != job_id:
        raise ObjectMissing(f"the store has no object of the output {ref.file_id}")
    return StoredObject(found.name, ref.size_bytes)


async def remove_outputs(store: Store, job_id: str) -> None:
    """Remove all objects of a job. Raises StoreUnavailable."""
    await remove_all(store, _of_job(job_id))


async def remove_all(store: Store, prefix: str) -> None:
    """Remove all objects whose names begin with a prefix. Raises StoreUnavailable."""
    names: list[str] = []
    async with aclosing(store.list(prefix)) as objects:
        async for item in objects:
            names.append(item.name)
    for at in range(0, len(names), _AT_ONCE):
        await store.delete(names[at : at + _AT_ONCE])


async def outputs_before(store: Store, time: datetime) -> AsyncGenerator[OutputObject, None]:
    """Yield the objects that were written before a time. Raises StoreUnavailable."""
    async with aclosing(store.list(_FOLDER)) as objects:
        async for item in objects:
            if item.modified < time and (found := parsed_name(item.name)) is not None:
                yield found


def parsed_name(name: str) -> OutputObject | None:
    """Return what the name of an object tells; None for a name that no object of an output has."""
    parts = name.split("/")
    if len(parts) < _MIN_PARTS:
        return None
    folder, _, hash_, nonce, *folders, _ = parts
    try:
        job_id = base64.urlsafe_b64decode("".join(folders)).decode()
    except ValueError:
        return None
    if f"{folder}/" != _FOLDER or hash_ != _hash(job_id):
        return None
    return OutputObject(name, f"{OUTPUT_ID_PREFIX}{hash_}{nonce}", job_id)


def _of_job(job_id: str) -> str:
    return f"{_FOLDER}{tenant_of(job_id) or '-'}/{_hash(job_id)}/"


def _hash(job_id: str) -> str:
    return hashlib.sha256(job_id.encode()).hexdigest()[:_HALF]
