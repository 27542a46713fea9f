"""The gateway's side of workflows.llm_ledger: slots are reserved and released in groups.

A workflow takes few updates at once (Temporal refuses the eleventh in flight), and few signals a second. So each
process has one update and one signal in flight for each ledger, and each carries all that has arrived meanwhile.
"""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import Message
from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowQueryRejectedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import QueryRejectCondition, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from llm_pb import internal_pb2
from runtime.group_commit import GroupCommit
from runtime.shared_calls import SharedCalls
from runtime.temporal import RPC_TIMEOUT
from services.gateway.updates import execute_update

_log = logging.getLogger(__name__)
T = TypeVar("T")
_MAX_GROUP: Final = 500
"""Maximum number of jobs in an update or signal: 120 KB of ids."""
MAX_WAITING: Final = 1000
"""Maximum number of Submits that wait for one ledger."""
_MAX_RELEASES: Final = 100_000
"""Maximum number of releases that wait for one ledger. Beyond it the ledger's checks have to find the ended jobs."""
_RETRY: Final = timedelta(milliseconds=50)
_LONGEST_RETRY: Final = timedelta(seconds=5)
_RELEASE_TIMEOUT: Final = timedelta(seconds=5)
RELEASE_TRIES: Final = 100
"""Maximum number of tries of a release: over 7 minutes. A ledger checks its jobs every 10 minutes."""
_PASSING: Final = (
    RPCStatusCode.ABORTED,
    RPCStatusCode.CANCELLED,
    RPCStatusCode.DEADLINE_EXCEEDED,
    RPCStatusCode.RESOURCE_EXHAUSTED,
    RPCStatusCode.UNAVAILABLE,
)
"""Failures of a release that pass. The SDK gives up a call after its timeout."""
_REFUSALS: Final = (names.QUOTA_REACHED, names.TOKENS_RESERVED, names.TOKENS_USED)


class _Job(NamedTuple):
    """A job whose slot is reserved or released."""

    id: str
    output_tokens: int
    reservation: int


class Ledger:
    """The ledger of one tenant, as one gateway reserves its slots."""

    def __init__(
        self, client: Client, workflow_queue: str, id_: str, limit: int, tokens_per_day: int | None = None
    ) -> None:
        """`limit` is the maximum number of slots in use, `tokens_per_day` that of output tokens."""
        self._client = client
        self._workflow_queue = workflow_queue
        self.id: Final = id_
        self.limit: Final = limit
        self.tokens_per_day: Final = tokens_per_day
        self._shared = SharedCalls()
        self._groups: GroupCommit[_Job, str] = GroupCommit(
            self._reserve_group, max_group=_MAX_GROUP, max_waiting=MAX_WAITING
        )

    async def reserve(self, job_id: str, output_tokens: int = 0, reservation: int = 0) -> str:
        """Reserve a slot for the job; return why it has none now, a type of error of Reserve. Empty: it has one.

        `reservation` is as in ReserveRequest.reservations.

        Raises TooManyWaitingError; CommitError when the ledger does not answer, and TimeoutError when others have kept
        it from answering in time. The job may have a slot then.
        """
        async with asyncio.timeout(RPC_TIMEOUT.total_seconds()):
            return await self._groups.add(_Job(job_id, output_tokens, reservation))

    async def used(self) -> int:
        """Return the number of slots in use. Concurrent calls share the answer.

        Raises RPCError when Temporal or the workflow worker is unavailable, and WorkflowQueryFailedError for a ledger
        whose keys were deleted: it is terminated, and has no slots at the next call.
        """
        return await self._shared.fresh(self.id, lambda: self._query(names.QUERY_COUNT_SLOTS, 0))

    async def usage(self) -> internal_pb2.LedgerUsage:
        """Return the slots and output tokens in use. Like used()."""
        nothing = internal_pb2.LedgerUsage()
        return await self._shared.fresh((self.id, "usage"), lambda: self._query(names.QUERY_GET_USAGE, nothing))

    async def lease(self, request: internal_pb2.LeaseRequest) -> internal_pb2.LeaseResponse:
        """Lease output tokens to a batch. Raises RPCError and WorkflowUpdateFailedError: call again."""
        try:
            return await self._lease(request)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
        await self._start()
        return await self._lease(request)

    async def _lease(self, request: internal_pb2.LeaseRequest) -> internal_pb2.LeaseResponse:
        answer: internal_pb2.LeaseResponse = await execute_update(
            self._handle(), names.UPDATE_LEASE, request, result_type=internal_pb2.LeaseResponse
        )
        return answer

    async def _query(self, name: str, nothing: T) -> T:
        """Return the ledger's answer, or `nothing` without a ledger."""
        try:
            answer: T = await self._handle().query(
                name,
                result_type=type(nothing),
                reject_condition=QueryRejectCondition.NOT_OPEN,
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowQueryRejectedError:
            # It was terminated. The next one begins without slots.
            return nothing
        except RPCError as error:
            # No job has needed a slot yet.
            if error.status == RPCStatusCode.NOT_FOUND:
                return nothing
            raise
        return answer

    async def _reserve_group(self, jobs: Sequence[_Job]) -> Sequence[str]:
        request = internal_pb2.ReserveRequest(
            workflow_ids=[job.id for job in jobs],
            limit=self.limit,
            output_tokens_limit=self.tokens_per_day,
            reservations=_reservations(jobs),
        )
        if self.tokens_per_day is not None:
            request.output_tokens.extend(job.output_tokens for job in jobs)
        try:
            response = await self._update(names.UPDATE_RESERVE, request, internal_pb2.ReserveResponse)
        except _RefusedError as error:
            return [str(error)] * len(jobs)
        refused = dict.fromkeys(response.refused, names.QUOTA_REACHED)
        refused |= dict.fromkeys(response.refused_by_reserved_tokens, names.TOKENS_RESERVED)
        refused |= dict.fromkeys(response.refused_by_used_tokens, names.TOKENS_USED)
        return [refused.get(job.id, "") for job in jobs]

    async def count_files(self, request: internal_pb2.CountFilesRequest) -> internal_pb2.CountFilesResponse:
        """Count files of the tenant. Raises TimeoutError when the ledger does not answer."""
        return await self._update(names.UPDATE_COUNT_FILES, request, internal_pb2.CountFilesResponse)

    async def _update(self, name: str, request: Message, kind: type[T]) -> T:
        """Return the result of an update, which is repeated until the ledger takes it.

        Raises _RefusedError with the type of error of a Reserve that is refused, TimeoutError.
        """
        async with asyncio.timeout(RPC_TIMEOUT.total_seconds()):
            while True:
                try:
                    result: T = await self._handle().execute_update(
                        name, request, result_type=kind, rpc_timeout=RPC_TIMEOUT
                    )
                except WorkflowUpdateFailedError as error:
                    if isinstance(error.cause, ApplicationError) and error.cause.type in _REFUSALS:
                        raise _RefusedError(error.cause.type) from None
                    # The ledger was continued or terminated while it had the update.
                    _log.info("%s did not take a %s: %r", self.id, name, error.cause)
                except WorkflowUpdateRPCTimeoutOrCancelledError as error:
                    # The SDK raises it for a cancel of this task, too.
                    if (task := asyncio.current_task()) is not None and task.cancelling():
                        raise asyncio.CancelledError from error
                    _log.info("%s did not take a %s: Temporal gave the call up", self.id, name)
                except RPCError as error:
                    if error.status == RPCStatusCode.NOT_FOUND:
                        await self._start()
                        continue
                    # Another update, of another gateway, was in the way; or Temporal does not answer.
                    _log.info("%s did not take a %s: %s %s", self.id, name, error.status.name, error)
                else:
                    return result
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


class _RefusedError(Exception):
    """The ledger has refused a Reserve. The message is the type of its error."""


class SlotReleases:
    """Releases slots of all ledgers."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._groups: dict[str, GroupCommit[_Job, None]] = {}
        """One for each ledger, so as many as there are tenants with a quota."""

    async def release(self, ledger: str, job_id: str, output_tokens: int, reservation: int = 0) -> None:
        """Release the slot of a job whose outcome is settled, and which has used so many output tokens of it.

        `reservation` is as in ReleaseRequest.reservations. Where Temporal is slow it is released some time later. A
        failure is logged, as is the end of RELEASE_TRIES. The slot is free then once a check of the ledger finds that
        the job has ended: at the next Reserve that would be refused, or within 10 minutes.
        """
        if ledger not in self._groups:
            commit = partial(self._release_group, ledger)
            self._groups[ledger] = GroupCommit(commit, max_group=_MAX_GROUP, max_waiting=_MAX_RELEASES)
        adding = asyncio.create_task(self._groups[ledger].add(_Job(job_id, output_tokens, reservation)))
        adding.add_done_callback(partial(_note_failure, ledger, job_id))
        # It stays in its group after that: the next check of the ledger may be ten minutes away.
        await asyncio.wait({adding}, timeout=_RELEASE_TIMEOUT.total_seconds())

    async def _release_group(self, ledger: str, jobs: Sequence[_Job]) -> Sequence[None]:
        request = internal_pb2.ReleaseRequest(
            workflow_ids=[job.id for job in jobs],
            output_tokens=[job.output_tokens for job in jobs],
            reservations=_reservations(jobs),
        )
        handle = self._client.get_workflow_handle(ledger)
        pause = _RETRY
        for left in reversed(range(RELEASE_TRIES)):
            try:
                await handle.signal(names.SIGNAL_RELEASE, request, rpc_timeout=_RELEASE_TIMEOUT)
                break
            except RPCError as error:
                if error.status not in _PASSING or not left:
                    raise
                # A busy Temporal has perhaps taken it. The ledger releases no slot twice.
                _log.info("%s did not take a release: %s %s", ledger, error.status.name, error)
            await asyncio.sleep(pause.total_seconds())
            pause = min(pause * 2, _LONGEST_RETRY)
        return [None] * len(jobs)


def _note_failure(ledger: str, job_id: str, adding: "asyncio.Task[None]") -> None:
    if not adding.cancelled() and (error := adding.exception()) is not None:
        _log.warning("the slot of %s was not released, %s finds it later: %r", job_id, ledger, error)


def _reservations(jobs: Sequence[_Job]) -> Sequence[int]:
    """Return the reservations of the jobs; nothing where none has one."""
    return [job.reservation for job in jobs] if any(job.reservation for job in jobs) else ()
