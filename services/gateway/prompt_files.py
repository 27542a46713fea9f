"""Checks a job's prompt_file before the job is accepted, as far as that is cheap: the worker reads all of it."""

import codecs
from collections.abc import Iterator
from contextlib import aclosing
from typing import Final

from jobs.field_rules import Violation, too_large
from jobs.file_rules import check_prompt_file
from jobs.limits import MAX_PROMPT_FILE_BYTES
from llm_pb import common_pb2, file_pb2, internal_pb2, llm_pb2
from runtime.auth import Caller
from services.gateway.errors import FileNotFound
from services.gateway.files.failures import store_errors
from services.gateway.files.reader import FileReader
from services.gateway.models.catalogue import Models
from store.store import Store, StoredObject

_FIELD: Final = "job.prompt_file"
_HEAD_BYTES: Final = 64 * 1024
"""Size of the beginning that is read."""


class PromptFiles:
    """Checks the prompt_file of jobs."""

    def __init__(self, reader: FileReader, store: Store | None, models: Models) -> None:
        self._reader = reader
        self._store = store
        self._models = models

    async def check(self, caller: Caller, job: llm_pb2.JobRequest) -> list[Violation]:
        """Return what is wrong with the job's prompt_file for the caller, beyond the rules; nothing without one.

        Raises ApiError UNAVAILABLE while the store is away, RPCError, KeysUnavailable.
        """
        if not job.HasField("prompt_file") or job.prompt or job.messages or [*check_prompt_file("", job.prompt_file)]:
            return []
        if self._store is None:
            return [Violation(_FIELD, "cannot be used here: the operator has set no store of files")]
        asked = job.prompt_file
        try:
            record = await self._reader.record(caller, asked.file_id)
        except FileNotFound:
            return [Violation(f"{_FIELD}.file_id", "names no file, or one that has expired; upload it first")]
        if record.file.state != file_pb2.FILE_STATE_READY:
            return [Violation(f"{_FIELD}.file_id", "names a file whose upload has not ended")]
        violations = [*_differences(asked, record.file.ref)]
        size = record.file.ref.size_bytes
        most = min(MAX_PROMPT_FILE_BYTES, self._models.max_prompt_bytes(job.model) or MAX_PROMPT_FILE_BYTES)
        if size > most:
            violations.append(Violation(_FIELD, too_large(size, most)))
        if not size:
            violations.append(Violation(_FIELD, "is empty"))
        return violations or [*_not_text(await self._head(self._store, record))]

    async def _head(self, store: Store, record: internal_pb2.FileRecord) -> bytes:
        head = bytearray()
        with store_errors(record.file.ref.file_id):
            for segment in record.segments:
                stored = StoredObject(segment.name, segment.size)
                async with aclosing(store.read(stored, 0, _HEAD_BYTES - len(head))) as pieces:
                    async for piece in pieces:
                        head += piece
                if len(head) >= _HEAD_BYTES:
                    break
        return bytes(head)


def _differences(asked: common_pb2.FileRef, found: common_pb2.FileRef) -> Iterator[Violation]:
    if asked.sha256 not in (b"", found.sha256):
        yield Violation(f"{_FIELD}.sha256", f"is not that of the file, {found.sha256.hex()}")
    if asked.size_bytes not in (0, found.size_bytes):
        yield Violation(f"{_FIELD}.size_bytes", f"is not that of the file, {found.size_bytes}")


def _not_text(head: bytes) -> Iterator[Violation]:
    try:
        # The last character may be cut.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        yield Violation(_FIELD, f"is no UTF-8 at byte {error.start}")
