"""The activities by which pipelines read and write files of text: see pipelines.files."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from typing import Final, NoReturn

from google.rpc import code_pb2, error_details_pb2, status_pb2
from temporalio import activity
from temporalio.exceptions import ApplicationError

from jobs import names
from jobs.errors import reason_of
from jobs.ids import file_id, tenant_of
from jobs.pipelines import FILE_IS_NO_TEXT, MAX_TEXT_BYTES, OUTPUT_TOO_LARGE
from llm_pb import common_pb2, file_pb2, internal_pb2
from runtime.auth import Caller
from runtime.scopes import SCOPES
from services.gateway.errors import ApiError, files_disabled
from services.gateway.files.failures import store_errors
from services.gateway.files.produced import ProducedFiles
from services.gateway.files.quotas import FileQuotas
from services.gateway.files.reader import FileReader
from store.store import Store, StoredObject

_PURPOSE: Final = "pipeline_output"
_LONGEST_WAIT: Final = timedelta(minutes=1)
"""Maximum wait before a retry. A limit that names a longer one fails its step immediately."""
_QUOTA_EXCEEDED: Final = "QUOTA_EXCEEDED"


class PipelineTexts:
    """Reads and writes files for pipelines, each for the user of the pipeline that asks."""

    def __init__(self, reader: FileReader, files: ProducedFiles, quotas: FileQuotas, store: Store | None) -> None:
        self._reader = reader
        self._files = files
        self._quotas = quotas
        self._store = store

    @activity.defn(name=names.ACTIVITY_READ_TEXT)
    async def read_text(self, request: internal_pb2.ReadTextRequest) -> str:
        """Return the text of a file."""
        ref, owner = request.file, Caller(_tenant(), "", SCOPES, user_id=request.user_id)
        content = bytearray()
        try:
            record = await self._reader.record(owner, ref.file_id)
            found = record.file.ref
            if record.file.state != file_pb2.FILE_STATE_READY or ref.sha256 not in (b"", found.sha256):
                message = f"there is no file {ref.file_id} of this content: it was deleted, or its upload has not ended"
                raise ApplicationError(message, type="FILE_NOT_FOUND", non_retryable=True)
            if found.size_bytes > MAX_TEXT_BYTES:
                message = f"the file has {found.size_bytes} bytes; at most {MAX_TEXT_BYTES} can be read"
                raise ApplicationError(message, type=OUTPUT_TOO_LARGE, non_retryable=True)
            store = self._required_store()
            with store_errors(ref.file_id):
                for segment in record.segments:
                    async with aclosing(store.read(StoredObject(segment.name, segment.size))) as pieces:
                        async for piece in pieces:
                            content += piece
        except ApiError as error:
            fail(error)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            message = f"the file is no UTF-8 at byte {error.start}"
            raise ApplicationError(message, type=FILE_IS_NO_TEXT, non_retryable=True) from error

    @activity.defn(name=names.ACTIVITY_WRITE_TEXT)
    async def write_text(self, request: internal_pb2.WriteTextRequest) -> common_pb2.FileRef:
        """Write a file once for each path and content of a pipeline, and return it."""
        tenant, content = _tenant(), request.text.encode()
        sha256 = hashlib.sha256(content)
        # No request_id of an upload has a slash. A pipeline that goes on after a failure may write another content.
        key = f"pipeline/{activity.info().workflow_id}/{request.path}/{sha256.hexdigest()}"
        id_ = file_id(request.user_id, key, tenant)
        if (earlier := await self._files.found(id_, tenant)) is not None:
            return earlier
        try:
            store = self._required_store().of_tenant(tenant)
            # When the file is created is not known before its record is started.
            counts = await self._quotas.take(tenant, id_, len(content), 0)
            with store_errors(id_):
                stored = await store.put(store.new_name(self._files.prefix(id_, tenant)), _pieces(content))
            counts()
        except ApiError as error:
            fail(error)
        file = file_pb2.File(
            user_id=request.user_id, filename=request.path.replace("/", "-"), purpose=_PURPOSE, ref=common_pb2.FileRef()
        )
        file.ref.file_id, file.ref.sha256 = id_, sha256.digest()
        file.ref.size_bytes, file.ref.media_type = stored.size, request.media_type
        return await self._files.record(file, tenant, stored.name)

    def _required_store(self) -> Store:
        if self._store is None:
            raise files_disabled()
        return self._store


def fail(error: ApiError) -> NoReturn:
    """Raise ApplicationError with the reason of a refusal.

    Temporal tries again what is only away for a while, and a limit that names a time of at most a minute until a retry:
    after that time, and as long as the step has time. Every other refusal is final, that of a full quota of files, too:
    a file goes only when its user deletes it or its time is over.
    """
    wait = _wait_of(error.status)
    passes = error.status.code == code_pb2.UNAVAILABLE or wait is not None
    raise ApplicationError(
        error.status.message, type=reason_of(error.status), non_retryable=not passes, next_retry_delay=wait
    ) from error


def _wait_of(status: status_pb2.Status) -> timedelta | None:
    """Return the time after which a limit may let a retry pass; None where the step should not wait for it."""
    info = error_details_pb2.RetryInfo()
    if status.code != code_pb2.RESOURCE_EXHAUSTED or reason_of(status) == _QUOTA_EXCEEDED:
        return None
    if not any(detail.Unpack(info) for detail in status.details):
        return None
    wait = info.retry_delay.ToTimedelta()
    return wait if wait <= _LONGEST_WAIT else None


def _tenant() -> str:
    return tenant_of(activity.info().workflow_id or "")


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content
