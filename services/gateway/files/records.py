"""The records of files, as uploads write them: begun, continued by a segment, let go."""

import asyncio
import hashlib
import logging
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio.client import WorkflowUpdateFailedError
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption
from jobs import names, options
from jobs.field_rules import Violation
from jobs.ids import file_workflow_id, tenant_of
from jobs.memo import to_memo
from jobs.search import about_user, user_value
from llm_pb import file_pb2, internal_pb2
from runtime import audit
from runtime.auth import Caller
from services.gateway.effects import Effects
from services.gateway.errors import (
    ApiError,
    file_key_reused,
    file_not_found,
    invalid,
    store_unavailable,
    temporal_unavailable,
    upload_overtaken,
)
from services.gateway.files.quotas import FileQuotas
from services.gateway.files.reader import FileReader, FoundFile, file_of, found_file
from services.gateway.settings import GatewaySettings
from store.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)
_MIN_TTL: Final = timedelta(minutes=1)
_COMMIT_TIME: Final = timedelta(seconds=30)
_TOO_MANY_SEGMENTS: Final = "came in too many small parts for one file; upload it again, with more data in each call"
_RETRY_SECONDS: Final = 0.2


class FileRecords:
    """Starts and updates the workflows that are records of files."""

    def __init__(
        self,
        effects: Effects,
        reader: FileReader,
        store: Store,
        quotas: FileQuotas,
        settings: GatewaySettings,
        encryption: Encryption | None,
    ) -> None:
        self._effects = effects
        self._reader = reader
        self._store = store
        self._quotas = quotas
        self._settings = settings
        self._encryption = encryption

    async def begin(self, caller: Caller, first: file_pb2.UploadFileRequest, id_: str) -> FoundFile:
        """Return the file under the key of an upload, which is new or has the same description.

        Raises ApiError INVALID_ARGUMENT for a new one whose time has come, and what its callees raise.
        """
        workflow_id = file_workflow_id(id_, caller.tenant)
        if (found := await self._found(workflow_id, first)) is not None:
            return found
        now = datetime.now(UTC)
        declared = first.file
        # Only here: a repeat may come later.
        if declared.HasField("expire_time") and declared.expire_time.ToDatetime(UTC) <= now:
            raise invalid([Violation("file.expire_time", "must be in the future")])
        audit.require_available()
        file = file_pb2.File(
            ref=declared.ref,
            user_id=declared.user_id,
            filename=declared.filename,
            purpose=declared.purpose,
            state=file_pb2.FILE_STATE_UPLOADING,
        )
        file.ref.file_id = id_
        file.create_time.FromDatetime(now)
        counts = await self._quotas.take(caller.tenant, id_, declared.ref.size_bytes, _created(file))
        file.expire_time.FromDatetime(now + self._settings.file_upload_ttl)
        record = internal_pb2.FileRecord(
            file=file,
            upload_ttl=options.duration(self._settings.file_upload_ttl),
            prefix=f"files/{caller.tenant or '-'}/{id_}/{uuid.uuid4().hex}/",
        )
        record.ready_expire_time.FromDatetime(self._expiry(declared, now))
        hash_ = None if self._encryption is None else await self._encryption.search_hash(caller.tenant)
        about = about_user(file.user_id, user_value(file.user_id, hash_))
        attributes = [*about.search_attributes]
        if caller.tenant:
            attributes.append(SearchAttributePair(names.TENANT_ID, caller.tenant))
        try:
            handle = await self._effects.start(
                names.FILE_WORKFLOW_TYPE,
                record,
                id_=workflow_id,
                last_check=counts,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo={
                    **(about.memo or {}),
                    names.MEMO_FILE: to_memo(file),
                    names.MEMO_FILE_DIGEST: _digest(declared),
                },
                search_attributes=TypedSearchAttributes(attributes),
            )
        except WorkflowAlreadyStartedError:
            if (found := await self._found(workflow_id, first)) is None:
                await self._quotas.give_back(caller.tenant, id_, _created(file))
                raise store_unavailable("the file under this key has just gone; call again") from None
            # The ledger has counted the file that was to be created here, which nobody will delete.
            await self._quotas.take(caller.tenant, id_, declared.ref.size_bytes, _created(found.file))
            return found
        _log.info("upload begins", extra={"file_id": id_})
        return FoundFile(file, handle.first_execution_run_id or "")

    def _expiry(self, declared: file_pb2.File, now: datetime) -> datetime:
        latest = now + self._settings.file_ttl
        if not declared.HasField("expire_time"):
            return latest
        return min(latest, max(declared.expire_time.ToDatetime(UTC), now + min(_MIN_TTL, self._settings.file_ttl)))

    async def _found(self, workflow_id: str, first: file_pb2.UploadFileRequest) -> FoundFile | None:
        """Return the file of the open record under an id. Raises ApiError for another one, or one that is going."""
        description = await self._reader.find(workflow_id)
        if description is None:
            return None
        found = await found_file(description)
        if found is None:
            raise store_unavailable("the deleted file under this key is still being removed; call again")
        if await description.memo_value(names.MEMO_FILE_DIGEST, None) != _digest(first.file):
            raise file_key_reused(first.file.user_id, first.request_id)
        return found

    async def remove(self, workflow_id: str, found: FoundFile) -> None:
        """Mark a file as deleted, unless it is gone. Raises RPCError, AuditUnavailable."""
        try:
            await self._effects.update(workflow_id, names.UPDATE_DELETE_FILE, first_run_id=found.first_run_id)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
        except WorkflowUpdateFailedError as error:
            # It has ended with the update.
            _log.info("%s did not take a delete: %r", workflow_id, error.cause)
        await self._quotas.give_back(tenant_of(workflow_id), found.file.ref.file_id, _created(found.file))

    async def commit(
        self,
        workflow_id: str,
        found: FoundFile,
        commit: internal_pb2.CommitSegmentRequest,
        began: float,
        *,
        counted: bool,
    ) -> FoundFile:
        """Commit a segment of a file, and return the file, which ends with it. A repeat of the update changes nothing.

        `began` is the loop's time when the segment's object was begun. `counted`: whether the quotas count the file's
        whole size since its beginning, because it was declared. Raises ApiError ABORTED when another upload was
        faster, NOT_FOUND when the file is gone, RESOURCE_EXHAUSTED beyond a quota, INVALID_ARGUMENT beyond the maximum
        number of segments.
        """
        counts, id_, created = None, found.file.ref.file_id, _created(found.file)
        if not counted and commit.segment.size:
            try:
                counts = await self._quotas.take(
                    tenant_of(workflow_id), id_, commit.offset + commit.segment.size, created
                )
            except ApiError:
                await self._discard(workflow_id, commit)
                raise
        now = asyncio.get_running_loop().time
        until = now() + _COMMIT_TIME.total_seconds()
        update_id = uuid.uuid4().hex
        while True:
            if now() - began > self._settings.file_sweep_age.total_seconds() / 2:
                raise temporal_unavailable("this gateway was suspended while it handled the call; call again")
            if counts is not None:
                counts()
            try:
                changed: file_pb2.File = await self._effects.update(
                    workflow_id,
                    names.UPDATE_COMMIT_SEGMENT,
                    commit,
                    first_run_id=found.first_run_id,
                    update_id=update_id,
                    result_type=file_pb2.File,
                )
            except WorkflowUpdateFailedError as error:
                if isinstance(error.cause, ApplicationError):
                    await self._discard(workflow_id, commit)
                    if error.cause.type == names.TOO_MANY_SEGMENTS:
                        raise invalid([Violation("data", _TOO_MANY_SEGMENTS)]) from error
                    raise await self._refusal(workflow_id, found, counted=counts is not None) from error
                # The record was continued in a new run while it had the update.
                _log.info("%s did not take a commit: %r", workflow_id, error.cause)
            except RPCError as error:
                if error.status == RPCStatusCode.NOT_FOUND:
                    await self._discard(workflow_id, commit)
                    raise await self._refusal(workflow_id, found, counted=counts is not None) from error
                if now() > until:
                    raise
                _log.info("%s did not take a commit: %s %s", workflow_id, error.status.name, error)
            else:
                if changed.committed_bytes != commit.offset + commit.segment.size:
                    # Its answer was lost, and another upload has gone on before the repeat.
                    raise upload_overtaken(changed.committed_bytes)
                return found._replace(file=changed)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _discard(self, workflow_id: str, commit: internal_pb2.CommitSegmentRequest) -> None:
        """Remove the object of a refused commit, unless the record names it: then an earlier try has committed it.

        The sweeper finds what stays.
        """
        if not commit.segment.name:
            return
        with suppress(StoreUnavailable, ApiError, RPCError):
            record = await self._reader.record_of(workflow_id)
            if all(segment.name != commit.segment.name for segment in record.segments):
                await self._store.delete([commit.segment.name])

    async def _refusal(self, workflow_id: str, found: FoundFile, *, counted: bool) -> ApiError:
        """Return the error for a commit that is refused. `counted`: whether the quotas count what it would have added.

        Raises RPCError.
        """
        tenant, id_ = tenant_of(workflow_id), found.file.ref.file_id
        description = await self._reader.find(workflow_id)
        file = await file_of(description) if description is not None else None
        if file is not None and file.create_time == found.file.create_time:
            return upload_overtaken(file.committed_bytes)
        if counted and file is None:
            await self._quotas.give_back(tenant, id_, _created(found.file))
        elif counted and file is not None:
            # The ledger has counted the file that is gone in place of the one that was uploaded under its key.
            with suppress(ApiError):
                await self._quotas.take(tenant, id_, max(file.committed_bytes, file.ref.size_bytes), _created(file))
        return file_not_found(id_)


def _created(file: file_pb2.File) -> int:
    """Return the create_time of a file in nanoseconds."""
    return file.create_time.ToNanoseconds()


def _digest(declared: file_pb2.File) -> str:
    """Return a digest of what an upload says of its file, without its time: a repeat has a later one."""
    said = file_pb2.File()
    said.CopyFrom(declared)
    for field in ("committed_bytes", "create_time", "expire_time", "state"):
        said.ClearField(field)
    said.ref.ClearField("file_id")
    return hashlib.sha256(said.SerializeToString(deterministic=True)).hexdigest()
