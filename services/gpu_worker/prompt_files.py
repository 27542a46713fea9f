"""Reads the prompts that are files: the record of the file from Temporal, its content from the store.

A file is looked up in the tenant of the job, whatever id the job names, so no job reads another tenant's.
"""

import asyncio
import hashlib
import logging
from contextlib import aclosing
from typing import Final

from temporalio import activity
from temporalio.client import WorkflowQueryFailedError
from temporalio.service import RPCError

from encryption import KeysUnavailable, Unreadable
from jobs.errors import EngineFailed, InvalidJob, PromptFileMissing, PromptTooLong
from jobs.ids import OUTPUT_ID_PREFIX, file_workflow_id, tenant_of
from jobs.limits import MAX_PROMPT_FILE_BYTES
from jobs.records import read_record
from llm_pb import common_pb2, file_pb2, internal_pb2
from runtime.temporal import RPC_TIMEOUT
from store.outputs import find_output
from store.store import ObjectMissing, Store, StoredObject, StoreUnavailable

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 2


class PromptFiles:
    """The files that this worker reads."""

    def __init__(self, store: Store | None) -> None:
        self._store = store

    async def read(self, ref: common_pb2.FileRef, job_id: str) -> str:
        """Return the text of a file that a job names. Waits for a store or a Temporal that is away.

        Raises PromptFileMissing, InvalidJob for a content that is no text, PromptTooLong for one that no model takes,
        EngineFailed where this worker has no store.
        """
        if self._store is None:
            raise EngineFailed("the prompt is a file, and this worker has no store (STORE_URL)")
        while True:
            try:
                return await self._read(self._store, ref, tenant_of(job_id))
            except (StoreUnavailable, KeysUnavailable, WorkflowQueryFailedError, RPCError) as error:
                _log.warning("the file of the prompt cannot be read yet: %s", error)
            except (ObjectMissing, Unreadable) as error:
                # A file that is being deleted still has its record.
                raise PromptFileMissing(f"the content of {ref.file_id} is gone: {error}") from error
            await asyncio.sleep(_RETRY_SECONDS)

    async def _read(self, store: Store, ref: common_pb2.FileRef, tenant: str) -> str:
        if ref.file_id.startswith(OUTPUT_ID_PREFIX):
            record = await _output(store, ref, tenant)
        else:
            record_id = file_workflow_id(ref.file_id, tenant)
            record = await read_record(activity.client(), record_id, internal_pb2.FileRecord, RPC_TIMEOUT)
        found = record.file
        if found.state != file_pb2.FILE_STATE_READY:
            raise PromptFileMissing(f"there is no file {ref.file_id} any more: it was deleted, or has expired")
        if found.ref.size_bytes > MAX_PROMPT_FILE_BYTES:
            raise PromptTooLong(f"the file has {found.ref.size_bytes} bytes; at most {MAX_PROMPT_FILE_BYTES}")
        content = bytearray()
        for segment in record.segments:
            async with aclosing(store.read(StoredObject(segment.name, segment.size))) as pieces:
                async for piece in pieces:
                    content += piece
        sha256 = hashlib.sha256(content).digest()
        if sha256 != found.ref.sha256 or ref.sha256 not in (b"", sha256):
            # It was deleted, and another one was uploaded under its key.
            raise PromptFileMissing(f"the content of {ref.file_id} is another one than the job names")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise InvalidJob(f"prompt_file is no UTF-8 at byte {error.start}") from error


async def _output(store: Store, ref: common_pb2.FileRef, tenant: str) -> internal_pb2.FileRecord:
    """Return the record that an uploaded file would have; an empty one without an object. Raises StoreUnavailable.

    The gateway has checked who may see it, and the hash tells that it is the one that the job names.
    """
    stored = await find_output(store, tenant, ref.file_id)
    if stored is None:
        return internal_pb2.FileRecord()
    record = internal_pb2.FileRecord(file=file_pb2.File(ref=ref, state=file_pb2.FILE_STATE_READY))
    record.segments.add(name=stored.name, size=ref.size_bytes)
    return record
