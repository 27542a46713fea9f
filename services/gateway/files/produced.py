"""Files that the suite itself writes: records of FileService for content that is in the store already."""

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
from jobs.ids import file_workflow_id
from jobs.memo import to_memo
from jobs.search import about_user, user_value
from llm_pb import common_pb2, file_pb2, internal_pb2
from runtime.temporal import RPC_TIMEOUT
from services.gateway.files.reader import FileReader, file_of
from services.gateway.settings import GatewaySettings

_GOING: Final = "the file of an earlier attempt is being removed"


class ProducedFiles:
    """Creates the records of files."""

    def __init__(
        self, client: Client, reader: FileReader, settings: GatewaySettings, encryption: Encryption | None
    ) -> None:
        self._client = client
        self._reader = reader
        self._settings = settings
        self._encryption = encryption

    def prefix(self, id_: str, tenant: str) -> str:
        """Return a new prefix for the object of a file. What is written there and never recorded is swept."""
        return f"files/{tenant or '-'}/{id_}/{uuid.uuid4().hex}/"

    async def found(self, id_: str, tenant: str) -> common_pb2.FileRef | None:
        """Return the file that an earlier attempt has recorded. Raises RPCError, KeysUnavailable."""
        description = await self._reader.find(file_workflow_id(id_, tenant))
        file = await file_of(description) if description is not None else None
        return file.ref if file is not None else None

    async def record(self, file: file_pb2.File, tenant: str, name: str) -> common_pb2.FileRef:
        """Return the file whose content is the object of a name; the one of an earlier attempt if there is one.

        Of `file` are needed: the whole `ref`, user_id, filename and purpose. Raises RPCError, KeysUnavailable.
        """
        id_, now = file.ref.file_id, datetime.now(UTC)
        file.state, file.committed_bytes = file_pb2.FILE_STATE_READY, file.ref.size_bytes
        file.create_time.FromDatetime(now)
        file.expire_time.FromDatetime(now + self._settings.file_ttl)
        record = internal_pb2.FileRecord(file=file, prefix=name.rpartition("/")[0] + "/")
        record.ready_expire_time.CopyFrom(file.expire_time)
        record.segments.add(name=name, size=file.ref.size_bytes)
        hash_ = None if self._encryption is None else await self._encryption.search_hash(tenant)
        about = about_user(file.user_id, user_value(file.user_id, hash_))
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
            if (earlier := await self.found(id_, tenant)) is None:
                raise ApplicationError(_GOING) from None
            return earlier
        return file.ref
