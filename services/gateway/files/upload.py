"""UploadFile: data become objects of the store, each of which the file's record then takes as its next segment."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from jobs import file_rules
from jobs.field_rules import Violation
from jobs.ids import file_id, file_workflow_id
from llm_pb import file_pb2, internal_pb2
from runtime import audit
from runtime.auth import Caller
from runtime.keyed_limiter import KeyedLimiter
from services.gateway.errors import exhausted, file_not_found, invalid, upload_overtaken, wrong_offset
from services.gateway.files.failures import store_errors
from services.gateway.files.incoming import Incoming
from services.gateway.files.reader import FileReader, FoundFile
from services.gateway.files.records import FileRecords
from services.gateway.settings import GatewaySettings
from store.store import ObjectMissing, Store, StoredObject, StoreUnavailable


class Uploads:
    """The UploadFile calls that this gateway serves."""

    def __init__(
        self,
        records: FileRecords,
        reader: FileReader,
        store: Store,
        settings: GatewaySettings,
    ) -> None:
        self._records = records
        self._reader = reader
        self._store = store
        self._settings = settings
        most = settings.max_uploads
        message = f"this gateway takes {most} uploads at once, half of them of one tenant; call again or call another"
        self._all = KeyedLimiter(most, lambda: exhausted(message))
        self._of_tenant = KeyedLimiter(-(-most // 2), lambda: exhausted(message))

    async def upload(
        self, caller: Caller, requests: AsyncIterator[file_pb2.UploadFileRequest]
    ) -> file_pb2.UploadFileResponse:
        """Serve one call; see file.proto. The messages have passed file_rules.check_upload().

        Raises ApiError, RPCError, KeysUnavailable, PayloadError, AuditUnavailable.
        """
        first = await anext(requests, None)
        if first is None:
            raise invalid([Violation("", "the call has ended without a request; send one")])
        if violations := file_rules.check_first(first) or self._bounds(first.file):
            raise invalid(violations)
        id_ = file_id(first.file.user_id, first.request_id, caller.tenant)
        audit.describe(user_id=first.file.user_id, file=id_)
        async with self._all.acquired(), self._of_tenant.acquired(caller.tenant):
            found = await self._records.begin(caller, first, id_)
            file = found.file
            if file.state != file_pb2.FILE_STATE_READY:
                if first.offset != file.committed_bytes:
                    raise wrong_offset(first.offset, file.committed_bytes)
                incoming = Incoming(first, requests)
                try:
                    file = await self._receive(caller, first.file, found, incoming)
                finally:
                    await incoming.close()
        return file_pb2.UploadFileResponse(file=file)

    def _bounds(self, declared: file_pb2.File) -> list[Violation]:
        """Return the violations of the operator's settings."""
        violations = []
        if declared.ref.size_bytes > self._settings.file_max_bytes:
            rule = f"must be at most {self._settings.file_max_bytes}"
            violations.append(Violation("file.ref.size_bytes", rule))
        return violations

    async def _receive(
        self, caller: Caller, declared: file_pb2.File, found: FoundFile, incoming: Incoming
    ) -> file_pb2.File:
        """Write what comes to the store and commit it, segment by segment; return the file as it is then."""
        id_ = found.file.ref.file_id
        workflow_id = file_workflow_id(id_, caller.tenant)
        record = await self._reader.record_of(workflow_id)
        _require_same(record, found)
        segments = [StoredObject(item.name, item.size) for item in record.segments]
        store = self._store.of_tenant(caller.tenant)
        # What an earlier call has sent is read back only when the file is whole.
        sha256 = None if segments else hashlib.sha256()
        size, counted = found.file.committed_bytes, bool(declared.ref.size_bytes)

        async def hashed() -> AsyncGenerator[bytes, None]:
            nonlocal size
            async with aclosing(incoming.segment(len(segments))) as pieces:
                async for piece in pieces:
                    size += len(piece)
                    self._check_size(declared, size)
                    if sha256 is not None:
                        sha256.update(piece)
                    yield piece

        async def content() -> "hashlib._Hash":
            async with self._store_errors(workflow_id, record):
                return await _hash_of(store, segments)

        while await incoming.begin_segment():
            began = asyncio.get_running_loop().time()
            async with self._store_errors(workflow_id, record):
                segment = await store.put(store.new_name(record.prefix), hashed())
            segments.append(segment)
            commit = internal_pb2.CommitSegmentRequest(offset=found.file.committed_bytes)
            commit.segment.name, commit.segment.size = segment
            if incoming.last:
                await self._finish(commit, workflow_id, found, declared, segments, sha256 or await content())
            found = await self._records.commit(workflow_id, found, commit, began, counted=counted)
        if incoming.last and found.file.state != file_pb2.FILE_STATE_READY:
            commit = internal_pb2.CommitSegmentRequest(offset=found.file.committed_bytes)
            await self._finish(commit, workflow_id, found, declared, segments, sha256 or await content())
            now = asyncio.get_running_loop().time()
            found = await self._records.commit(workflow_id, found, commit, now, counted=counted)
        return found.file

    def _check_size(self, declared: file_pb2.File, size: int) -> None:
        most = self._settings.file_max_bytes
        if size > most:
            raise invalid([Violation("data", f"exceeds the maximum size of a file, {most} bytes")])
        if declared.ref.size_bytes and size > declared.ref.size_bytes:
            rule = f"says {declared.ref.size_bytes} bytes, and more are sent"
            raise invalid([Violation("file.ref.size_bytes", rule)])

    async def _finish(
        self,
        commit: internal_pb2.CommitSegmentRequest,
        workflow_id: str,
        found: FoundFile,
        declared: file_pb2.File,
        segments: list[StoredObject],
        sha256: "hashlib._Hash",
    ) -> None:
        """Make the commit the last one. Raises ApiError, and removes the file, if it is not what was declared."""
        size = sum(segment.size for segment in segments)
        violations = []
        if declared.ref.size_bytes not in (0, size):
            rule = f"says {declared.ref.size_bytes} bytes; the content has {size}"
            violations.append(Violation("file.ref.size_bytes", rule))
        if declared.ref.sha256 not in (b"", sha256.digest()):
            rule = f"says {declared.ref.sha256.hex()}; the content has {sha256.hexdigest()}"
            violations.append(Violation("file.ref.sha256", rule))
        if violations:
            # Another upload under the key may be what was declared.
            _require_same(await self._reader.record_of(workflow_id), found)
            await self._records.remove(workflow_id, found)
            raise invalid(violations)
        commit.last, commit.sha256 = True, sha256.digest()

    @asynccontextmanager
    async def _store_errors(self, workflow_id: str, record: internal_pb2.FileRecord) -> AsyncIterator[None]:
        """Raise the errors of the store as store_errors() does; NOT_FOUND for a file that was deleted meanwhile.

        Its objects are removed, and so is the folder into which the next one is written.
        """
        id_ = record.file.ref.file_id
        with store_errors(id_):
            try:
                yield
            except (StoreUnavailable, ObjectMissing):
                # Another file may have been uploaded under its key.
                if (await self._reader.record_of(workflow_id)).prefix != record.prefix:
                    raise file_not_found(id_) from None
                raise


def _require_same(record: internal_pb2.FileRecord, found: FoundFile) -> None:
    """Raise ApiError unless the record is that of the file, and nothing was committed since it was found."""
    if not record.prefix or record.file.create_time != found.file.create_time:
        raise file_not_found(found.file.ref.file_id)
    if record.file.committed_bytes != found.file.committed_bytes:
        raise upload_overtaken(record.file.committed_bytes)


async def _hash_of(store: Store, segments: list[StoredObject]) -> "hashlib._Hash":
    """Return the hash of what the segments hold together. Raises what a Store raises."""
    sha256 = hashlib.sha256()
    for segment in segments:
        async with aclosing(store.read(segment)) as pieces:
            async for piece in pieces:
                sha256.update(piece)
    return sha256
