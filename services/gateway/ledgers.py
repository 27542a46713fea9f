"""The gateway's side of workflows.llm_ledger: slots are reserved and released in groups, and ended jobs are found.

A workflow takes few updates at once (Temporal refuses the eleventh in flight), and few signals a second. So each
process has one update and one signal in flight for each ledger, and each carries all that has arrived meanwhile.
"""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Final

from temporalio import activity
from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowQueryRejectedError,
    WorkflowUpdateFailedError,
)
from temporalio.common import QueryRejectCondition, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from llm_pb import internal_pb2
from runtime.group_commit import GroupCommit
from runtime.shared_calls import SharedCalls
from runtime.temporal import RPC_TIMEOUT
from services.gateway.runs import describe_twice

_log = logging.getLogger(__name__)
_MAX_GROUP: Final = 500
"""Maximum number of jobs in an update or signal: 120 KB of ids."""
MAX_WAITING: Final = 1000
"""Maximum number of Submits that wait for one ledger."""
_MAX_RELEASES: Final = 100_000
"""Maximum number of releases that wait for one ledger. Beyond it the ledger's checks have to find the ended jobs."""
_RETRY: Final = timedelta(milliseconds=50)
_RELEASE_TIMEOUT: Final = timedelta(seconds=5)
_DESCRIBES: Final = 10
"""Maximum number of jobs that are described concurrently."""


class Ledger:
    """The ledger of one tenant, as one gateway reserves its slots."""

    def __init__(self, client: Client, workflow_queue: str, id_: str, limit: int) -> None:
        """`limit` is the maximum number of slots in use."""
        self._client = client
        self._workflow_queue = workflow_queue
        self.id: Final = id_
        self.limit: Final = limit
        self._shared = SharedCalls()
        self._groups: GroupCommit[str, bool] = GroupCommit(
            self._reserve_group, max_group=_MAX_GROUP, max_waiting=MAX_WAITING
        )

    async def reserve(self, job_id: str) -> bool:
        """Reserve a slot for the job; return whether it has one now.

        Raises TooManyWaitingError; CommitError when the ledger does not answer, and TimeoutError when others have kept
        it from answering in time. The job may have a slot then.
        """
        async with asyncio.timeout(RPC_TIMEOUT.total_seconds()):
            return await self._groups.add(job_id)

    async def used(self) -> int:
        """Return the number of slots in use. Concurrent calls share the answer.

        Raises RPCError when Temporal or the workflow worker is unavailable, and WorkflowQueryFailedError for a ledger
        whose keys were deleted: it is terminated, and has no slots at the next call.
        """
        return await self._shared.fresh(self.id, self._used)

    async def _used(self) -> int:
        try:
            used: int = await self._handle().query(
                names.QUERY_COUNT_SLOTS,
                result_type=int,
                reject_condition=QueryRejectCondition.NOT_OPEN,
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowQueryRejectedError:
            # It was terminated. The next one begins without slots.
            return 0
        except RPCError as error:
            # No job has needed a slot yet.
            if error.status == RPCStatusCode.NOT_FOUND:
                return 0
            raise
        return used

    async def _reserve_group(self, job_ids: Sequence[str]) -> Sequence[bool]:
        request = internal_pb2.ReserveRequest(workflow_ids=job_ids, limit=self.limit)
        async with asyncio.timeout(RPC_TIMEOUT.total_seconds()):
            while True:
                try:
                    response: internal_pb2.ReserveResponse = await self._handle().execute_update(
                        names.UPDATE_RESERVE,
                        request,
                        result_type=internal_pb2.ReserveResponse,
                        rpc_timeout=RPC_TIMEOUT,
                    )
                except WorkflowUpdateFailedError as error:
                    if isinstance(error.cause, ApplicationError) and error.cause.type == names.QUOTA_REACHED:
                        return [False] * len(job_ids)
                    # The ledger was continued or terminated while it had the update.
                    _log.info("%s did not take a Reserve: %r", self.id, error.cause)
                except RPCError as error:
                    if error.status == RPCStatusCode.NOT_FOUND:
                        await self._start()
                        continue
                    # Another update, of another gateway, was in the way; or Temporal does not answer.
                    _log.info("%s did not take a Reserve: %s %s", self.id, error.status.name, error)
                else:
                    refused = {*response.refused}
                    return [id_ not in refused for id_ in job_ids]
                await asyncio.sleep(_RETRY.total_seconds())

    async def _start(self) -> None:
        await self._client.start_workflow(
            names.LEDGER_WORKFLOW_TYPE,
            internal_pb2.LedgerState(),
            id=self.id,
            task_queue=self._workflow_queue,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            rpc_timeout=RPC_TIMEOUT,
        )

    def _handle(self) -> "WorkflowHandle[object, object]":
        return self._client.get_workflow_handle(self.id)


class SlotReleases:
    """Releases slots of all ledgers."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._groups: dict[str, GroupCommit[str, None]] = {}
        """One for each ledger, so as many as there are tenants with a quota."""

    async def release(self, ledger: str, job_id: str) -> None:
        """Release the slot of a job whose outcome is settled. A failure is logged: a check of the ledger finds it."""
        if ledger not in self._groups:
            commit = partial(self._release_group, ledger)
            self._groups[ledger] = GroupCommit(commit, max_group=_MAX_GROUP, max_waiting=_MAX_RELEASES)
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT.total_seconds()):
                await self._groups[ledger].add(job_id)
        except Exception as error:  # noqa: BLE001  # no job must fail for it
            _log.warning("the slot of %s was not released, %s finds it later: %r", job_id, ledger, error)

    async def _release_group(self, ledger: str, job_ids: Sequence[str]) -> Sequence[None]:
        request = internal_pb2.ReleaseRequest(workflow_ids=job_ids)
        handle = self._client.get_workflow_handle(ledger)
        await handle.signal(names.SIGNAL_RELEASE, request, rpc_timeout=_RELEASE_TIMEOUT)
        return [None] * len(job_ids)


class LedgerActivities:
    """The local activity of a ledger's workflow."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @activity.defn(name=names.ACTIVITY_FIND_ENDED_JOBS)
    async def find_ended_jobs(self, request: internal_pb2.FindEndedJobsRequest) -> internal_pb2.FindEndedJobsResponse:
        """Return which of the jobs are closed, and which are unknown."""
        found, describing = internal_pb2.FindEndedJobsResponse(), asyncio.Semaphore(_DESCRIBES)

        async def find(id_: str) -> None:
            async with describing:
                status = await self._status(id_)
            if status == WorkflowExecutionStatus.RUNNING:
                return
            (found.ended if status else found.missing).append(id_)

        results = await asyncio.gather(*map(find, request.workflow_ids), return_exceptions=True)
        if errors := [result for result in results if result is not None]:
            _log.warning("%d jobs could not be described, such as: %r", len(errors), errors[0])
        return found

    async def _status(self, id_: str) -> WorkflowExecutionStatus | None:
        """Return the status of a job; None if Temporal has said twice that there is none. Raises RPCError."""
        try:
            return (await describe_twice(self._client.get_workflow_handle(id_))).status
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return None
