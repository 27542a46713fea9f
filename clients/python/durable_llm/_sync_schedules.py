"""The calls of ScheduleService, for code without asyncio."""

from collections.abc import Generator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from durable_llm._schedules import AsyncSchedules
from durable_llm._sync_files import Runner
from llm_pb import schedule_pb2

if TYPE_CHECKING:
    from llm_pb.schedule_pb2 import OverlapPolicy, ScheduleStatus


class Schedules:
    """AsyncSchedules for code without asyncio: `Client.schedules`."""

    def __init__(self, loop: Runner, schedules: AsyncSchedules) -> None:
        self._loop = loop
        self._schedules = schedules

    def create(
        self, schedule: schedule_pb2.Schedule | None = None, /, *, paused: bool = False, **fields: Any
    ) -> "ScheduleStatus":
        """See AsyncSchedules.create."""
        return self._loop.run(self._schedules.create(schedule, paused=paused, **fields))

    def get(self, schedule_id: str) -> schedule_pb2.GetScheduleResponse:
        """See AsyncSchedules.get."""
        return self._loop.run(self._schedules.get(schedule_id))

    def list(self, **filters: Any) -> Generator[schedule_pb2.ScheduleSummary, None, None]:
        """See AsyncSchedules.list."""
        return self._loop.iterate(self._schedules.list(**filters))

    def update(
        self, schedule_id: str, schedule: schedule_pb2.Schedule | None = None, /, **fields: Any
    ) -> "ScheduleStatus":
        """See AsyncSchedules.update."""
        return self._loop.run(self._schedules.update(schedule_id, schedule, **fields))

    def pause(self, schedule_id: str, note: str = "") -> None:
        """See AsyncSchedules.pause."""
        self._loop.run(self._schedules.pause(schedule_id, note))

    def unpause(self, schedule_id: str, note: str = "") -> None:
        """See AsyncSchedules.unpause."""
        self._loop.run(self._schedules.unpause(schedule_id, note))

    def trigger(
        self, schedule_id: str, overlap: "OverlapPolicy.ValueType" = schedule_pb2.OVERLAP_POLICY_UNSPECIFIED
    ) -> None:
        """See AsyncSchedules.trigger."""
        self._loop.run(self._schedules.trigger(schedule_id, overlap))

    def backfill(
        self,
        schedule_id: str,
        start: datetime,
        end: datetime,
        overlap: "OverlapPolicy.ValueType" = schedule_pb2.OVERLAP_POLICY_UNSPECIFIED,
    ) -> int:
        """See AsyncSchedules.backfill."""
        return self._loop.run(self._schedules.backfill(schedule_id, start, end, overlap))

    def delete(self, schedule_id: str) -> None:
        """See AsyncSchedules.delete."""
        self._loop.run(self._schedules.delete(schedule_id))
