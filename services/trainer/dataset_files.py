"""Fetches the files of documents: the record of a file from Temporal, its content from the store.

A file is looked up in the tenant of the pipeline, whatever id the spec names, so no training reads another tenant's.
"""

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from jobs.ids import file_workflow_id
from jobs.records import read_record
from jobs.training import DATASET_MISSING, LIMIT_EXCEEDED
from llm_pb import common_pb2, file_pb2, internal_pb2
from runtime.temporal import RPC_TIMEOUT
from store.store import Store, StoredObject


async def fetch_file(
    client: Client,
    store: Store,
    ref: common_pb2.FileRef,
    tenant: str,
    max_bytes: int,
    path: Path,
    progressed: Callable[[], object],
) -> bytes:
    """Write the content of a file to a path; return its SHA-256. Calls `progressed` for each piece.

    Raises ApplicationError for a file that is gone or too large; the errors of the store, RPCError,
    WorkflowQueryFailedError.
    """
    record = await read_record(client, file_workflow_id(ref.file_id, tenant), internal_pb2.FileRecord, RPC_TIMEOUT)
    found = record.file
    if found.state != file_pb2.FILE_STATE_READY:
        raise _refused(DATASET_MISSING, f"there is no file {ref.file_id} any more: it was deleted, or has expired")
    if found.ref.size_bytes > max_bytes:
        raise _refused(LIMIT_EXCEEDED, f"the file {ref.file_id} has {found.ref.size_bytes} bytes; at most {max_bytes}")
    sha256 = hashlib.sha256()
    with path.open("wb") as into:
        for segment in record.segments:
            async with aclosing(store.read(StoredObject(segment.name, segment.size))) as pieces:
                async for piece in pieces:
                    sha256.update(piece)
                    await asyncio.to_thread(into.write, piece)
                    progressed()
    if sha256.digest() != found.ref.sha256 or ref.sha256 not in (b"", sha256.digest()):
        # It was deleted, and another one was uploaded under its key.
        raise _refused(DATASET_MISSING, f"the content of {ref.file_id} is another one than the training names")
    return sha256.digest()


def _refused(reason: str, message: str) -> ApplicationError:
    return ApplicationError(message, type=reason, non_retryable=True)
