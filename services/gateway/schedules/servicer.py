"""The methods of ScheduleService. See services.gateway.servicer."""

from typing import Any

import grpc

from llm_pb import schedule_pb2, schedule_pb2_grpc
from runtime.grpc_auth import current_caller
from services.gateway.schedules.listing import ScheduleListing
from services.gateway.schedules.service import ScheduleService

_Context = grpc.aio.ServicerContext[Any, Any]


class ScheduleServicer(schedule_pb2_grpc.ScheduleServiceServicer):
    """The methods of schedule.proto."""

    def __init__(self, schedules: ScheduleService, listing: ScheduleListing) -> None:
        self._schedules = schedules
        self._listing = listing

    async def CreateSchedule(
        self, request: schedule_pb2.CreateScheduleRequest, context: _Context
    ) -> schedule_pb2.CreateScheduleResponse:
        """See schedule.proto."""
        status = await self._schedules.create(current_caller(), request.schedule, paused=request.paused)
        return schedule_pb2.CreateScheduleResponse(status=status)

    async def GetSchedule(
        self, request: schedule_pb2.GetScheduleRequest, context: _Context
    ) -> schedule_pb2.GetScheduleResponse:
        """See schedule.proto."""
        return await self._schedules.get(current_caller(), request.schedule_id)

    async def ListSchedules(
        self, request: schedule_pb2.ListSchedulesRequest, context: _Context
    ) -> schedule_pb2.ListSchedulesResponse:
        """See schedule.proto."""
        return await self._listing.list_page(current_caller(), request)

    async def UpdateSchedule(
        self, request: schedule_pb2.UpdateScheduleRequest, context: _Context
    ) -> schedule_pb2.UpdateScheduleResponse:
        """See schedule.proto."""
        status = await self._schedules.update(current_caller(), request.schedule_id, request.schedule)
        return schedule_pb2.UpdateScheduleResponse(status=status)

    async def PauseSchedule(
        self, request: schedule_pb2.PauseScheduleRequest, context: _Context
    ) -> schedule_pb2.PauseScheduleResponse:
        """See schedule.proto."""
        await self._schedules.pause(current_caller(), request.schedule_id, request.note, paused=True)
        return schedule_pb2.PauseScheduleResponse()

    async def UnpauseSchedule(
        self, request: schedule_pb2.UnpauseScheduleRequest, context: _Context
    ) -> schedule_pb2.UnpauseScheduleResponse:
        """See schedule.proto."""
        await self._schedules.pause(current_caller(), request.schedule_id, request.note, paused=False)
        return schedule_pb2.UnpauseScheduleResponse()

    async def TriggerSchedule(
        self, request: schedule_pb2.TriggerScheduleRequest, context: _Context
    ) -> schedule_pb2.TriggerScheduleResponse:
        """See schedule.proto."""
        await self._schedules.trigger(current_caller(), request.schedule_id, request.overlap)
        return schedule_pb2.TriggerScheduleResponse()

    async def BackfillSchedule(
        self, request: schedule_pb2.BackfillScheduleRequest, context: _Context
    ) -> schedule_pb2.BackfillScheduleResponse:
        """See schedule.proto."""
        return schedule_pb2.BackfillScheduleResponse(times=await self._schedules.backfill(current_caller(), request))

    async def DeleteSchedule(
        self, request: schedule_pb2.DeleteScheduleRequest, context: _Context
    ) -> schedule_pb2.DeleteScheduleResponse:
        """See schedule.proto."""
        await self._schedules.delete(current_caller(), request.schedule_id)
        return schedule_pb2.DeleteScheduleResponse()
