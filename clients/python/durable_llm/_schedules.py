"""The calls of ScheduleService."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from google.protobuf.timestamp_pb2 import Timestamp

from durable_llm._retrying_stub import RetryingStub
from llm_pb import schedule_pb2

if TYPE_CHECKING:
    from llm_pb.schedule_pb2 import OverlapPolicy, ScheduleStatus


class AsyncSchedules:
    """Schedules, which start jobs by themselves: `AsyncClient.schedules`."""

    def __init__(self, stub: RetryingStub) -> None:
        self._stub = stub

    async def create(
        self, schedule: schedule_pb2.Schedule | None = None, /, *, paused: bool = False, **fields: Any
    ) -> "ScheduleStatus":
        """Create a schedule, or find the equal one that was created under its user_id and request_id.

        A schedule is a Schedule, or its fields by name: `user_id="alice", request_id="nightly",
        times={"cron": ["0 6 * * *"], "time_zone": "Europe/Berlin"}, job={"model": "docstrings", "prompt": "def f("}`.
        Raises ApiError, and ValueError or TypeError for a field that Schedule does not have or that has another type.
        """
        request = schedule_pb2.CreateScheduleRequest(schedule=_schedule(schedule, fields), paused=paused)
        response: schedule_pb2.CreateScheduleResponse = await self._stub.unary("CreateSchedule", request)
        return response.status

    async def get(self, schedule_id: str) -> schedule_pb2.GetScheduleResponse:
        """Return a schedule and its status, with its next times and its last runs. Raises ApiError."""
        request = schedule_pb2.GetScheduleRequest(schedule_id=schedule_id)
        response: schedule_pb2.GetScheduleResponse = await self._stub.unary("GetSchedule", request)
        return response

    async def list(self, **filters: Any) -> AsyncGenerator[schedule_pb2.ScheduleSummary, None]:
        """Yield schedules, page after page. The filters are the fields of ListSchedulesRequest.

        Raises ApiError, and ValueError for a filter that ListSchedulesRequest does not have.
        """
        listed = self._stub.listed("ListSchedules", schedule_pb2.ListSchedulesRequest(**filters), "schedules")
        async with aclosing(listed):
            async for summary in listed:
                yield summary

    async def update(
        self, schedule_id: str, schedule: schedule_pb2.Schedule | None = None, /, **fields: Any
    ) -> "ScheduleStatus":
        """Replace a schedule by another one, as a whole. Raises like create()."""
        request = schedule_pb2.UpdateScheduleRequest(schedule_id=schedule_id, schedule=_schedule(schedule, fields))
        response: schedule_pb2.UpdateScheduleResponse = await self._stub.unary("UpdateSchedule", request)
        return response.status

    async def pause(self, schedule_id: str, note: str = "") -> None:
        """Pause a schedule. Raises ApiError."""
        request = schedule_pb2.PauseScheduleRequest(schedule_id=schedule_id, note=note)
        await self._stub.unary("PauseSchedule", request)

    async def unpause(self, schedule_id: str, note: str = "") -> None:
        """Resume a paused schedule. Raises ApiError."""
        request = schedule_pb2.UnpauseScheduleRequest(schedule_id=schedule_id, note=note)
        await self._stub.unary("UnpauseSchedule", request)

    async def trigger(
        self, schedule_id: str, overlap: "OverlapPolicy.ValueType" = schedule_pb2.OVERLAP_POLICY_UNSPECIFIED
    ) -> None:
        """Start a run now. A call that is tried again may start a second one. Raises ApiError."""
        request = schedule_pb2.TriggerScheduleRequest(schedule_id=schedule_id, overlap=overlap)
        await self._stub.unary("TriggerSchedule", request)

    async def backfill(
        self,
        schedule_id: str,
        start: datetime,
        end: datetime,
        overlap: "OverlapPolicy.ValueType" = schedule_pb2.OVERLAP_POLICY_UNSPECIFIED,
    ) -> int:
        """Start a run for each time of a range of the past, and return their number. Raises ApiError."""
        request = schedule_pb2.BackfillScheduleRequest(
            schedule_id=schedule_id, start_time=_timestamp(start), end_time=_timestamp(end), overlap=overlap
        )
        response: schedule_pb2.BackfillScheduleResponse = await self._stub.unary("BackfillSchedule", request)
        return response.times

    async def delete(self, schedule_id: str) -> None:
        """Delete a schedule. Jobs that it has started go on. Raises ApiError."""
        await self._stub.unary("DeleteSchedule", schedule_pb2.DeleteScheduleRequest(schedule_id=schedule_id))


def _schedule(schedule: schedule_pb2.Schedule | None, fields: dict[str, Any]) -> schedule_pb2.Schedule:
    whole = schedule_pb2.Schedule()
    if schedule is not None:
        whole.CopyFrom(schedule)
    whole.MergeFrom(schedule_pb2.Schedule(**fields))
    return whole


def _timestamp(time: datetime) -> Timestamp:
    made = Timestamp()
    # A time without a zone is one of this machine's.
    made.FromDatetime(time.astimezone(UTC))
    return made
