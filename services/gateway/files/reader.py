"""Reads the records of files from Temporal: what a file is, and which objects hold its content."""

import logging
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Final, NamedTuple

from temporalio.client import (
    Client,
    WorkflowExecution,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowQueryFailedError,
)

from encryption import Encryption, KeysUnavailable
from jobs import names
from jobs.ids import OUTPUT_ID_PREFIX, file_workflow_id, tenant_of
from jobs.memo import from_memo
from jobs.records import read_record
from llm_pb import common_pb2, file_pb2, internal_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from runtime.temporal import RPC_TIMEOUT
from services.gateway.access import read_own
from services.gateway.errors import file_not_found, temporal_unavailable
from services.gateway.files.outputs import JobOutputs
from services.gateway.job_record import user_of
from services.gateway.page_token import PageTokens
from services.gateway.runs import Runs
from services.gateway.visibility import DEFAULT_PAGE_SIZE, own_page, terms_of

_log = logging.getLogger(__name__)
_LIST_TIMEOUT: Final = timedelta(seconds=10)


class FoundFile(NamedTuple):
    """A file as its open record has it."""

    file: file_pb2.File
    first_run_id: str
    """That of the record's workflow. A file that is uploaded again under the same id has another one."""


class FileReader:
    """Reads files. A file of another tenant is not there: its workflow would have another id."""

    def __init__(
        self,
        client: Client,
        page_tokens: PageTokens,
        encryption: Encryption | None,
        outputs: JobOutputs | None = None,
        *,
        knows_tenants: bool,
    ) -> None:
        """`outputs` knows the files that are outputs of jobs: without them there are none.

        `knows_tenants`: whether the namespace has the search attribute TenantId.
        """
        self._outputs = outputs
        self._client = client
        self._runs = Runs(client)
        self._page_tokens = page_tokens
        self._encryption = encryption
        self._knows_tenants = knows_tenants

    async def find(self, workflow_id: str) -> WorkflowExecutionDescription | None:
        """Return the open record under an id, also one of a file that is being removed. Raises RPCError."""
        found = await self._runs.describe(workflow_id)
        if found is None or found.workflow_type != names.FILE_WORKFLOW_TYPE:
            return None
        return found if found.status == WorkflowExecutionStatus.RUNNING else None

    async def get(self, caller: Caller, file_id: str) -> file_pb2.File:
        """Return a file. Raises ApiError NOT_FOUND for one that the caller may not see, RPCError, PayloadError."""
        if file_id.startswith(OUTPUT_ID_PREFIX):
            return (await self._output(caller, file_id)).file
        return (await self.get_found(caller, file_id)).file

    async def get_found(self, caller: Caller, file_id: str) -> FoundFile:
        """Return a file that is no output of a job. Raises like get()."""
        return await self._found(caller, file_id, await self.find(file_workflow_id(file_id, caller.tenant)))

    async def get_deletable(self, caller: Caller, file_id: str) -> FoundFile:
        """Return what get_found() does. Of a file whose keys were deleted only the id is known.

        Raises like get_found(), but no PayloadError.
        """
        if (description := await self.find(file_workflow_id(file_id, caller.tenant))) is None:
            raise file_not_found(file_id)
        try:
            return await self._found(caller, file_id, description)
        except PayloadError:
            return FoundFile(file_pb2.File(ref=common_pb2.FileRef(file_id=file_id)), _first_run_id(description))

    async def _found(self, caller: Caller, file_id: str, description: WorkflowExecutionDescription | None) -> FoundFile:
        if description is None:
            raise file_not_found(file_id)

        async def user_of_unread(_: Exception) -> str:
            return await user_of(description)

        found = await read_own(
            caller,
            found_file(description),
            lambda found: found.file.user_id if found is not None else "",
            user_of_unread,
            lambda: file_not_found(file_id),
        )
        if found is None:
            raise file_not_found(file_id)
        return found

    async def record(self, caller: Caller, file_id: str) -> internal_pb2.FileRecord:
        """Return the record of a file, with its objects. Raises like get(), and UNAVAILABLE without an answer."""
        if file_id.startswith(OUTPUT_ID_PREFIX):
            return await self._output(caller, file_id)
        await self.get(caller, file_id)
        record = await self.record_of(file_workflow_id(file_id, caller.tenant))
        if not record.file.ref.file_id:
            raise file_not_found(file_id)
        return record

    async def _output(self, caller: Caller, file_id: str) -> internal_pb2.FileRecord:
        if self._outputs is None:
            raise file_not_found(file_id)
        return await self._outputs.record(caller, file_id)

    async def record_of(self, workflow_id: str) -> internal_pb2.FileRecord:
        """Return the record of an open workflow; an empty one when the file is gone. Raises ApiError, RPCError."""
        try:
            return await read_record(self._client, workflow_id, internal_pb2.FileRecord, RPC_TIMEOUT)
        except WorkflowQueryFailedError as error:
            raise temporal_unavailable("the record of the file does not answer; call again") from error

    async def list_page(self, caller: Caller, request: file_pb2.ListFilesRequest) -> file_pb2.ListFilesResponse:
        """Return a page of the files of the caller's tenant.

        Raises ApiError INVALID_ARGUMENT for a page_token that Temporal refuses, UNAVAILABLE when it does not answer in
        time; RPCError; KeysUnavailable when the files of a filter may have hashes.
        """
        page = self._client.list_workflows(
            await self._query(caller.tenant, request.user_id),
            page_size=request.page_size or DEFAULT_PAGE_SIZE,
            next_page_token=self._page_tokens.unseal(caller.tenant, request),
        )
        own, following = await own_page(page, caller.tenant, request, self._page_tokens, _LIST_TIMEOUT)
        response = file_pb2.ListFilesResponse(next_page_token=following)
        for item in own:
            file = await _readable(item)
            if file is not None and request.user_id in ("", file.user_id) and request.purpose in ("", file.purpose):
                response.files.append(file)
        return response

    async def all_of(self, tenant: str) -> AsyncGenerator[file_pb2.File, None]:
        """Yield the files of a tenant, as Temporal lists them. Raises ApiError UNAVAILABLE, RPCError."""
        items = self._client.list_workflows(await self._query(tenant, ""), rpc_timeout=RPC_TIMEOUT)
        async for item in items:
            if tenant_of(item.id) == tenant and (file := await _readable(item)) is not None:
                yield file

    async def _query(self, tenant: str, user_id: str) -> str:
        """Return the visibility query: see terms_of."""
        hash_ = await self._encryption.known_search_hash(tenant) if self._encryption is not None and user_id else None
        own = terms_of(tenant, {names.USER_ID: user_id}, hash_, knows_tenants=self._knows_tenants)
        return " AND ".join((f"WorkflowType = '{names.FILE_WORKFLOW_TYPE}'", "ExecutionStatus = 'Running'", *own))


async def file_of(execution: WorkflowExecution) -> file_pb2.File | None:
    """Return the file of a record; None once it is gone. Raises PayloadError, KeysUnavailable."""
    try:
        file = from_memo(await execution.memo_value(names.MEMO_FILE, None), file_pb2.File)
    except ValueError:
        # A workflow that was started by hand may hold anything.
        return None
    return file if file is not None and file.ref.file_id else None


async def found_file(description: WorkflowExecutionDescription) -> FoundFile | None:
    """Return the file of a record, None once it is gone. Raises like file_of()."""
    if (file := await file_of(description)) is None:
        return None
    return FoundFile(file, _first_run_id(description))


def _first_run_id(description: WorkflowExecutionDescription) -> str:
    return description.raw_description.workflow_execution_info.first_run_id


async def _readable(execution: WorkflowExecution) -> file_pb2.File | None:
    try:
        return await file_of(execution)
    except (PayloadError, KeysUnavailable) as error:
        _log.info("%s cannot be decrypted: %s", execution.id, error)
        return None
