"""The files that a batch produces: records of FileService, whose content is an object that the batch has written."""

import uuid
from datetime import UTC, datetime
from typing import Final

from temporalio.client import Client
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError

from encryption import Encryption
from jobs import names
from jobs.ids import file_id, file_workflow_id
from jobs.memo import to_memo
from jobs.search import about_user, user_value
from llm_pb import batch_pb2, common_pb2, file_pb2, internal_pb2
from runtime.temporal import RPC_TIMEOUT
from services.gateway.files.reader import FileReader, file_of
from services.gateway.settings import GatewaySettings

OUTPUT: Final = "output"
ERRORS: Final = "errors"
_PURPOSE: Final = "batch_output"


class BatchFiles:
    """Creates the records of a batch's files."""

    def __init__(
        self, client: Client, reader: FileReader, settings: GatewaySettings, encryption: Encryption | None
    ) -> None:
        self._client = client
        self._reader = reader
        self._settings = settings
        self._encryption = encryption

    def prefix(self, batch: batch_pb2.BatchRequest, batch_id: str, tenant: str, kind: str) -> str:
        """Return a new prefix for the object of a file. What is written there and never recorded is swept."""
        return f"files/{tenant or '-'}/{_id(batch, batch_id, tenant, kind)}/{uuid.uuid4().hex}/"

    async def record(
        self, batch: batch_pb2.BatchRequest, batch_id: str, tenant: str, kind: str, written: common_pb2.FileRef
    ) -> common_pb2.FileRef:
        """Return the file whose content an object is; the one of an earlier attempt if there is one.

        Raises RPCError, KeysUnavailable.
        """
        id_ = _id(batch, batch_id, tenant, kind)
        now = datetime.now(UTC)
        file = file_pb2.File(
            ref=written,
            user_id=batch.user_id,
            committed_bytes=written.size_bytes,
            filename=f"{batch.request_id}-{kind}.jsonl",
            purpose=_PURPOSE,
            state=file_pb2.FILE_STATE_READY,
        )
        file.ref.file_id = id_
        file.create_time.FromDatetime(now)
        file.expire_time.FromDatetime(now + self._settings.file_ttl)
        record = internal_pb2.FileRecord(file=file, prefix=written.file_id.rpartition("/")[0] + "/")
        record.ready_expire_time.CopyFrom(file.expire_time)
        record.segments.add(name=written.file_id, size=written.size_bytes)
        hash_ = None if self._encryption is None else await self._encryption.search_hash(tenant)
        about = about_user(batch.user_id, user_value(batch.user_id, hash_))
        attributes = [*about.search_attributes]
        if tenant:
            attributes.append(SearchAttributePair(names.TENANT_ID, tenant))
        try:
            await self._client.start_workflow(
                names.FILE_WORKFLOW_TYPE,
                record,
                id=file_workflow_id(id_, tenant),
                task_queue=self._settings.workflow_queue,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo={**(about.memo or {}), names.MEMO_FILE: to_memo(file)},
                search_attributes=TypedSearchAttributes(attributes),
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowAlreadyStartedError:
            found = await self._reader.find(file_workflow_id(id_, tenant))
            earlier = await file_of(found) if found is not None else None
            if earlier is None:
                raise ApplicationError("the file of an earlier attempt is being removed") from None
            return earlier.ref
        return file.ref


def _id(batch: batch_pb2.BatchRequest, batch_id: str, tenant: str, kind: str) -> str:
    # No request_id of an upload has a slash.
    return file_id(batch.user_id, f"batch/{batch_id}/{kind}", tenant)
