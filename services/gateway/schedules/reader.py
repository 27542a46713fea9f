"""Reads schedules from Temporal and returns them as the API describes them."""

import asyncio
import logging
from datetime import UTC, datetime
from typing import Final, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.client import (
    Client,
    ScheduleActionExecutionStartWorkflow,
    ScheduleActionResult,
    ScheduleActionStartWorkflow,
    ScheduleDescription,
)
from temporalio.service import RPCError, RPCStatusCode

from encryption import KeysUnavailable, is_hash
from jobs import names
from jobs.ids import tenant_of
from jobs.memo import from_memo
from jobs.schedules import nominal_time_of
from llm_pb import internal_pb2, schedule_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from runtime.temporal import RPC_TIMEOUT
from services.gateway.access import read_own
from services.gateway.errors import schedule_not_found
from services.gateway.schedule_client import client_for

_log = logging.getLogger(__name__)
_UNKNOWN: Final = (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT)


class StoredSchedule(NamedTuple):
    """A schedule as Temporal has it."""

    action: internal_pb2.ScheduledAction
    description: ScheduleDescription


class ScheduleReader:
    """Reads schedules."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def get(self, caller: Caller, id_: str) -> StoredSchedule:
        """Return a schedule.

        Raises ApiError NOT_FOUND for one that does not exist or that the caller may not see; RPCError; KeysUnavailable;
        PayloadError when its keys were deleted.
        """
        description = await self._describe(caller, id_)

        async def user_of_unread(error: Exception) -> str | None:
            user_id = description.typed_search_attributes.get(names.USER_ID) or ""
            if not is_hash(user_id):
                return user_id
            # Once its keys were deleted, the hash tells nobody.
            return "" if isinstance(error, PayloadError) else None

        (action,) = await read_own(
            caller,
            client_for(self._client, id_).data_converter.decode(
                list(_started_by(description).args), [internal_pb2.ScheduledAction]
            ),
            lambda decoded: decoded[0].schedule.user_id,
            user_of_unread,
            lambda: schedule_not_found(id_),
        )
        return StoredSchedule(action, description)

    async def require(self, caller: Caller, id_: str) -> None:
        """Raise what get() raises, but no PayloadError: a schedule whose keys were deleted can be deleted, too.

        A caller who is bound to a user cannot know whose that one is.
        """
        if caller.user_id:
            await self.get(caller, id_)
        else:
            await self._describe(caller, id_)

    async def _describe(self, caller: Caller, id_: str) -> ScheduleDescription:
        """Describe a schedule of the caller's tenant. Temporal is not asked about an id of another one."""
        if tenant_of(id_) != caller.tenant:
            raise schedule_not_found(id_)
        try:
            description = await self._client.get_schedule_handle(id_).describe(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status in _UNKNOWN:
                raise schedule_not_found(id_) from error
            raise
        if _started_by(description).workflow != names.SCHEDULED_WORKFLOW_TYPE:
            raise schedule_not_found(id_)
        return description

    async def status(self, description: ScheduleDescription) -> schedule_pb2.ScheduleStatus:
        """Return the status of a schedule that was just described. Raises RPCError."""
        info, state = description.info, description.schedule.state
        status = schedule_pb2.ScheduleStatus(
            schedule_id=description.id,
            paused=state.paused,
            note=state.note or "",
            create_time=timestamp(info.created_at),
            next_times=map(timestamp, info.next_action_times),
            recent_runs=await asyncio.gather(*map(self._run, info.recent_actions)),
            runs=info.num_actions,
            skipped=info.num_actions_skipped_overlap,
            missed=info.num_actions_missed_catchup_window,
        )
        if info.last_updated_at is not None:
            status.update_time.CopyFrom(timestamp(info.last_updated_at))
        return status

    async def _run(self, action: ScheduleActionResult) -> schedule_pb2.ScheduleRun:
        """Return a run: what its workflow has written, or what its id tells of one that is past its retention."""
        started = action.action
        run = schedule_pb2.ScheduleRun(start_time=timestamp(action.started_at))
        if not isinstance(started, ScheduleActionExecutionStartWorkflow):
            return run
        if (nominal := nominal_time_of(started.workflow_id)) is not None:
            run.nominal_time.CopyFrom(timestamp(nominal))
        handle = self._client.get_workflow_handle(started.workflow_id, run_id=started.first_execution_run_id)
        try:
            description = await handle.describe(rpc_timeout=RPC_TIMEOUT)
            written = from_memo(await description.memo_value(names.MEMO_RUN, None), schedule_pb2.ScheduleRun)
        except RPCError as error:
            if error.status not in _UNKNOWN:
                raise
            written = None
        except (PayloadError, KeysUnavailable, ValueError) as error:
            _log.info("the outcome of %s cannot be read: %s", started.workflow_id, error)
            written = None
        return written if written is not None else run


def _started_by(description: ScheduleDescription) -> ScheduleActionStartWorkflow:
    """Return what the schedule starts: Temporal's schedules have no other action yet."""
    action = description.schedule.action
    if not isinstance(action, ScheduleActionStartWorkflow):
        raise schedule_not_found(description.id)
    return action


def timestamp(time: datetime) -> Timestamp:
    """Return the protobuf form of a time."""
    message = Timestamp()
    message.FromDatetime(time.astimezone(UTC))
    return message
