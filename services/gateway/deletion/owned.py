"""The steps that delete the schedules and the files of a user: see workflows.llm_user_deletion.

Each step asks for the removal of what it finds, and may do so again: what is found is gone once it is found no more.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Final, TypeVar

from temporalio import activity
from temporalio.client import Client, WorkflowExecution, WorkflowExecutionStatus, WorkflowUpdateFailedError
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption, KeysUnavailable
from jobs import names
from jobs.ids import tenant_of
from llm_pb import internal_pb2
from payload_converter import PayloadError
from runtime.temporal import RPC_TIMEOUT
from services.gateway.files.reader import file_of
from services.gateway.runs import Runs
from services.gateway.visibility import terms_of

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_R = TypeVar("_R")
_AT_ONCE: Final = 100
"""Maximum number of schedules, runs or files that one step deletes."""
_CONCURRENT: Final = 8
_REASON: Final = "all of the user's is being deleted"
_SCHEDULERS: Final = "TemporalNamespaceDivision = 'TemporalScheduler' AND ExecutionStatus != 'Running'"
"""The closed runs of the workflows by which Temporal keeps its schedules. They hold what the schedules have started."""
_SCHEDULER_PREFIX: Final = "temporal-sys-scheduler:"
"""What stands before the id of a schedule in the id of its workflow."""


class OwnedDeletion:
    """Activities of LLMUserDeletionWorkflow."""

    def __init__(self, client: Client, encryption: Encryption | None) -> None:
        self._client = client
        self._runs = Runs(client)
        self._encryption = encryption

    @activity.defn(name=names.ACTIVITY_DELETE_SCHEDULES)
    async def delete_schedules(self, request: internal_pb2.DeleteOwnedRequest) -> internal_pb2.DeleteOwnedResponse:
        """Delete some schedules of the user, then some of their runs. What the runs have started goes on."""
        terms = await self._terms(request)
        schedules = [item.id async for item in await self._client.list_schedules(terms, page_size=_AT_ONCE)]
        schedules = [id_ for id_ in schedules if tenant_of(id_) == request.tenant][:_AT_ONCE]
        deleted = sum(await _each(schedules, self._delete_schedule))
        runs = await self._found(request, f"WorkflowType = '{names.SCHEDULED_WORKFLOW_TYPE}' AND {terms}")
        kept = await self._found(request, f"{_SCHEDULERS} AND {terms}")
        exist = await _each([*runs, *kept], self._remove_run)
        return internal_pb2.DeleteOwnedResponse(deleted=deleted, found=bool(deleted) or any(exist))

    @activity.defn(name=names.ACTIVITY_DELETE_FILES)
    async def delete_files(self, request: internal_pb2.DeleteOwnedRequest) -> internal_pb2.DeleteOwnedResponse:
        """Delete some files of the user, and some records of files that are gone."""
        query = f"WorkflowType = '{names.FILE_WORKFLOW_TYPE}' AND {await self._terms(request)}"
        records = await self._found(request, query, request.before.ToDatetime(UTC))
        states = await _each(records, self._delete_file)
        return internal_pb2.DeleteOwnedResponse(
            deleted=states.count(True), found=any(one is not None for one in states)
        )

    async def _terms(self, request: internal_pb2.DeleteOwnedRequest) -> str:
        """Return the terms of a query for what is the user's. The ids tell the tenant: not all have its attribute."""
        hash_ = None if self._encryption is None else await self._encryption.known_search_hash(request.tenant)
        return " AND ".join(terms_of("", {names.USER_ID: request.user_id}, hash_, knows_tenants=False))

    async def _found(
        self, request: internal_pb2.DeleteOwnedRequest, query: str, before: datetime | None = None
    ) -> list[WorkflowExecution]:
        """Return some workflows of a query. `before`: those of files that were created later do not count."""
        found: list[WorkflowExecution] = []
        async for item in self._client.list_workflows(query, page_size=_AT_ONCE, rpc_timeout=RPC_TIMEOUT):
            is_own = tenant_of(item.id.removeprefix(_SCHEDULER_PREFIX)) == request.tenant
            if is_own and (before is None or await _created(item) <= before):
                found.append(item)
            if len(found) == _AT_ONCE:
                break
        return found

    async def _delete_schedule(self, id_: str) -> bool:
        """Delete a schedule; return whether there was one. Visibility shows it for a moment longer."""
        try:
            await self._client.get_schedule_handle(id_).delete(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        _log.info("schedule deleted", extra={"schedule_id": id_})
        return True

    async def _remove_run(self, item: WorkflowExecution) -> bool:
        """Terminate a run that is open, remove a closed one from Temporal; return whether there was one."""
        last = await self._runs.describe(item.id, item.run_id)
        if last is None:
            return False
        if last.status == WorkflowExecutionStatus.RUNNING:
            await self._terminate(item)
        return not await self._runs.delete(item.id, (), [item.run_id])

    async def _delete_file(self, item: WorkflowExecution) -> bool | None:
        """Mark a file as deleted, or remove from Temporal the record of one that is.

        Return True for a file that was there, False for a record, None for one that Temporal does not have any more.
        """
        last = await self._runs.describe(item.id, item.run_id)
        if last is None:
            return None
        if last.status != WorkflowExecutionStatus.RUNNING:
            return None if await self._runs.delete(item.id, (), [item.run_id]) else False
        handle = self._client.get_workflow_handle(item.id, run_id=item.run_id)
        try:
            exists = await file_of(last) is not None
            if exists:
                await handle.execute_update(names.UPDATE_DELETE_FILE, rpc_timeout=RPC_TIMEOUT)
        except (PayloadError, WorkflowUpdateFailedError) as error:
            # Its keys were deleted, so it cannot remove its objects: the sweeper does. Or it has just ended.
            _log.info("%s cannot let its file be gone: %r", item.id, error)
            if isinstance(error, PayloadError):
                await self._terminate(item)
            return False
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return exists

    async def _terminate(self, item: WorkflowExecution) -> None:
        handle = self._client.get_workflow_handle(item.id, run_id=item.run_id)
        try:
            await handle.terminate(reason=_REASON, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            # It has closed meanwhile.
            if error.status != RPCStatusCode.NOT_FOUND:
                raise


async def _each(items: Iterable[_T], act: Callable[[_T], Awaitable[_R]]) -> list[_R]:
    """Return what an action returns for each of the items, of which some are acted on concurrently."""
    turns = asyncio.Semaphore(_CONCURRENT)

    async def one(item: _T) -> _R:
        async with turns:
            return await act(item)

    return await asyncio.gather(*map(one, items))


async def _created(item: WorkflowExecution) -> datetime:
    """Return when a file was created: a long upload runs in several runs of its workflow."""
    try:
        file = await file_of(item)
    except (PayloadError, KeysUnavailable):
        file = None
    return item.start_time if file is None else file.create_time.ToDatetime(UTC)
