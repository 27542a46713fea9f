"""The calls of ScheduleService: schedules of Temporal that start LLMScheduledWorkflow."""

import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta

from temporalio.api.workflowservice.v1 import ListScheduleMatchingTimesRequest
from temporalio.client import (
    Client,
    ScheduleAlreadyRunningError,
    ScheduleBackfill,
    ScheduleHandle,
    ScheduleState,
    ScheduleUpdate,
    ScheduleUpdateInput,
)
from temporalio.common import TypedSearchAttributes
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption
from jobs import names, work_start
from jobs.field_rules import Violation
from jobs.ids import schedule_id
from jobs.schedule_rules import to_datetime
from jobs.schedules import as_submitted, digest_of, work_of
from jobs.search import Hash, about_user, attributes_of, hashed_values, user_value
from llm_pb import internal_pb2, schedule_pb2
from runtime import audit
from runtime.auth import Caller
from runtime.temporal import RPC_TIMEOUT
from services.gateway.batches.submission import BatchSubmission
from services.gateway.effects import Effects
from services.gateway.errors import ScheduleNotFound, exhausted, invalid, schedule_key_reused, schedule_not_found
from services.gateway.schedules.bounds import UNKNOWN_ZONE
from services.gateway.schedules.form import OVERLAPS, to_temporal
from services.gateway.schedules.listing import ScheduleListing
from services.gateway.schedules.reader import ScheduleReader, StoredSchedule
from services.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)
_WAIT = timedelta(minutes=1)
"""The wait that a CreateSchedule beyond the bound is asked for. Nobody knows when a schedule is deleted."""


class ScheduleService:
    """Creates, reads and changes schedules."""

    def __init__(
        self,
        client: Client,
        effects: Effects,
        reader: ScheduleReader,
        listing: ScheduleListing,
        settings: GatewaySettings,
        encryption: Encryption | None,
        batches: BatchSubmission | None,
    ) -> None:
        """`batches` checks the files of batches; None where no schedule starts one."""
        self._client = client
        self._effects = effects
        self._reader = reader
        self._listing = listing
        self._settings = settings
        self._encryption = encryption
        self._batches = batches

    async def create(
        self, caller: Caller, schedule: schedule_pb2.Schedule, *, paused: bool = False, canary: bool = False
    ) -> schedule_pb2.ScheduleStatus:
        """Create the schedule, or return the equal one that was created under its key. It has passed all checks.

        Raises ApiError ALREADY_EXISTS for a key that belongs to another schedule, RESOURCE_EXHAUSTED when the tenant
        has its maximum number; RPCError; KeysUnavailable, AuditUnavailable.
        """
        id_ = schedule_id(schedule.user_id, schedule.request_id, caller.tenant)
        audit.describe(schedule=id_)
        digest = digest_of(schedule)
        if schedule.HasField("batch") and (found := await self._found(caller, id_)) is not None:
            # Its file may be gone now.
            return await self._as_created(found, digest)
        await self._check_input(caller, schedule)
        if await self._listing.count(caller.tenant) >= self._settings.max_schedules:
            # The bound is of new schedules.
            if (found := await self._found(caller, id_)) is not None:
                return await self._as_created(found, digest)
            message = f"there are {self._settings.max_schedules} schedules already; delete one first"
            raise exhausted(message, _WAIT)
        action = internal_pb2.ScheduledAction(
            schedule=schedule, created_sha256=digest, canary=canary, scopes=sorted(caller.scopes)
        )
        hash_ = await self._hash_for(caller.tenant)
        job = work_start.about(work_of(as_submitted(schedule)))
        about = about_user(schedule.user_id, user_value(schedule.user_id, hash_))
        state = ScheduleState(paused=paused)
        try:
            await self._effects.create_schedule(
                id_,
                to_temporal(action, id_, self._settings.workflow_queue, about, state),
                search_attributes=TypedSearchAttributes(attributes_of(job, caller.tenant, hash_)),
                memo={names.MEMO_SEARCH_ATTRIBUTES: hashed_values(job)} if hash_ is not None else None,
            )
        except ScheduleAlreadyRunningError:
            return await self._as_created(await self._reader.get(caller, id_), digest)
        except RPCError as error:
            if error.status == RPCStatusCode.ALREADY_EXISTS:
                return await self._as_created(await self._reader.get(caller, id_), digest)
            raise _refused(error) from error
        _log.info("schedule created", extra={"schedule_id": id_})
        return await self._status_of(caller, id_)

    async def get(self, caller: Caller, id_: str) -> schedule_pb2.GetScheduleResponse:
        """Return a schedule. Raises like ScheduleReader.get()."""
        found = await self._reader.get(caller, id_)
        status = await self._reader.status(found.description)
        if _may_pause(found.action.schedule, status):
            # Temporal looks at a run that has ended when it is asked, and answers before it has paused the schedule.
            found = await self._reader.get(caller, id_)
            status = await self._reader.status(found.description)
        return schedule_pb2.GetScheduleResponse(schedule=found.action.schedule, status=status)

    async def update(self, caller: Caller, id_: str, schedule: schedule_pb2.Schedule) -> schedule_pb2.ScheduleStatus:
        """Replace a schedule. The new one has passed all checks. Raises like get(), AuditUnavailable."""
        found = await self._reader.get(caller, id_)
        if schedule_id(schedule.user_id, schedule.request_id, caller.tenant) != id_:
            raise invalid([Violation("schedule.request_id", "must be, as user_id, that of the schedule to update")])
        await self._check_input(caller, schedule)
        action = internal_pb2.ScheduledAction()
        action.CopyFrom(found.action)
        action.schedule.CopyFrom(schedule)
        action.scopes[:] = sorted(caller.scopes)
        hash_ = await self._hash_for(caller.tenant)
        about = about_user(schedule.user_id, user_value(schedule.user_id, hash_))
        job = work_start.about(work_of(as_submitted(schedule)))
        attributes = TypedSearchAttributes(attributes_of(job, caller.tenant, hash_))

        def updated(current: ScheduleUpdateInput) -> ScheduleUpdate:
            state = current.description.schedule.state
            return ScheduleUpdate(to_temporal(action, id_, self._settings.workflow_queue, about, state), attributes)

        await self._change(id_, lambda handle: handle.update(updated, rpc_timeout=RPC_TIMEOUT))
        return await self._status_of(caller, id_)

    async def pause(self, caller: Caller, id_: str, note: str, *, paused: bool) -> None:
        """Pause a schedule, or let it go on. Raises like get(), AuditUnavailable."""
        await self._reader.require(caller, id_)
        # Without a note the SDK writes one of its own.
        note = note or ("paused" if paused else "unpaused")
        await self._change(
            id_,
            lambda handle: (handle.pause if paused else handle.unpause)(note=note, rpc_timeout=RPC_TIMEOUT),
        )

    async def trigger(self, caller: Caller, id_: str, overlap: "schedule_pb2.OverlapPolicy.ValueType") -> None:
        """Start a run now. Raises like get(), AuditUnavailable."""
        await self._reader.require(caller, id_)
        policy = OVERLAPS.get(overlap)
        await self._change(id_, lambda handle: handle.trigger(overlap=policy, rpc_timeout=RPC_TIMEOUT))

    async def backfill(self, caller: Caller, request: schedule_pb2.BackfillScheduleRequest) -> int:
        """Start a run for each time of a range, and return their number.

        Raises ApiError INVALID_ARGUMENT for too many; like get(), AuditUnavailable.
        """
        id_ = request.schedule_id
        await self._reader.require(caller, id_)
        start, end = to_datetime(request.start_time), to_datetime(request.end_time)
        if start is None or end is None:
            raise ValueError("the request has not been checked")
        matching = ListScheduleMatchingTimesRequest(namespace=self._client.namespace, schedule_id=id_)
        # Temporal leaves out the beginning of this range, but not that of the backfill.
        matching.start_time.FromDatetime(start - timedelta(milliseconds=1))
        matching.end_time.FromDatetime(end)
        service = self._client.workflow_service
        times = len((await service.list_schedule_matching_times(matching, timeout=RPC_TIMEOUT)).start_time)
        most = self._settings.max_backfill
        if times > most:
            rule = f"must leave at most {most} times of the schedule in the range: call more than once"
            raise invalid([Violation("end_time", rule)])
        policy = OVERLAPS[request.overlap or schedule_pb2.OVERLAP_POLICY_BUFFER_ALL]
        backfill = ScheduleBackfill(start, end, policy)
        await self._change(id_, lambda handle: handle.backfill(backfill, rpc_timeout=RPC_TIMEOUT))
        return times

    async def delete(self, caller: Caller, id_: str) -> None:
        """Delete a schedule. Raises like get(), AuditUnavailable."""
        await self._reader.require(caller, id_)
        await self._change(id_, lambda handle: handle.delete(rpc_timeout=RPC_TIMEOUT))
        _log.info("schedule deleted", extra={"schedule_id": id_})

    async def _status_of(self, caller: Caller, id_: str) -> schedule_pb2.ScheduleStatus:
        """Return the status of a schedule that was stored, or its id alone: the call has succeeded in any case.

        A Temporal that has had no schedule before starts their worker first, which takes some seconds.
        """
        try:
            return await self._reader.status((await self._reader.get(caller, id_)).description)
        except RPCError as error:
            _log.warning("%s is stored, and cannot be described yet: %s", id_, error)
            return schedule_pb2.ScheduleStatus(schedule_id=id_)

    async def _change(self, id_: str, change: Callable[[ScheduleHandle], Awaitable[None]]) -> None:
        try:
            await self._effects.change_schedule(id_, change)
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                raise schedule_not_found(id_) from error
            raise _refused(error) from error

    async def _found(self, caller: Caller, id_: str) -> StoredSchedule | None:
        try:
            return await self._reader.get(caller, id_)
        except ScheduleNotFound:
            return None

    async def _as_created(self, found: StoredSchedule, digest: bytes) -> schedule_pb2.ScheduleStatus:
        """Return the status of a schedule. Raises ApiError ALREADY_EXISTS if it was created as another one."""
        if found.action.created_sha256 != digest:
            raise schedule_key_reused(found.action.schedule.user_id, found.action.schedule.request_id)
        return await self._reader.status(found.description)

    async def _check_input(self, caller: Caller, schedule: schedule_pb2.Schedule) -> None:
        """Raise ApiError for a batch of a file that is not the caller's. Its runs may read all files of the tenant."""
        if schedule.HasField("batch") and self._batches is not None:
            await self._batches.check_input(caller, schedule.batch)

    async def _hash_for(self, tenant: str) -> Hash | None:
        return None if self._encryption is None else await self._encryption.search_hash(tenant)


def _may_pause(schedule: schedule_pb2.Schedule, status: schedule_pb2.ScheduleStatus) -> bool:
    """Return whether the last run of a schedule has failed that pauses then, and has not paused."""
    failed = bool(status.recent_runs) and status.recent_runs[-1].failures_in_a_row > 0
    return schedule.pause_on_failure and failed and not status.paused


def _refused(error: RPCError) -> Exception:
    """Return what a refusal by Temporal means. All but its own database of time zones was checked before."""
    if error.status == RPCStatusCode.INVALID_ARGUMENT and "time zone" in error.message:
        return invalid([UNKNOWN_ZONE])
    return error
