"""The paths of schedules."""

from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import Violation
from llm_pb import schedule_pb2
from services.http.failures import bad_request
from services.http.front import Front
from services.http.rest.handlers import Handlers, Query, list_parameters, located
from services.http.rest.messages import answer_with
from services.http.rest.operations import Operation, Parameter, Paths

_LIST: Final = list_parameters("schedules")
_BOOLEANS: Final = ("false", "true")
_CREATE: Final = {
    "paused": Parameter(
        "Whether the schedule is paused from its beginning.", {"type": "string", "enum": list(_BOOLEANS)}
    )
}


class Schedules(Handlers):
    """The handlers."""

    id_field = "schedule_id"

    async def create(self, request: Request, query: Query) -> Response:
        """Create a schedule. The body is a Schedule."""
        (paused,) = query.get("paused", ["false"])
        if paused not in _BOOLEANS:
            raise bad_request(Violation("paused", "must be true or false"))
        message = schedule_pb2.CreateScheduleRequest(paused=paused == "true")
        response = await self._send(request, "CreateSchedule", message, "schedule")
        return located(response, "schedules", response.status.schedule_id, HTTPStatus.CREATED)

    async def list(self, request: Request, query: Query) -> Response:
        """List schedules. The query holds the fields of ListSchedulesRequest."""
        return await self._list(request, "ListSchedules", schedule_pb2.ListSchedulesRequest(), query, {})

    async def get(self, request: Request, _: Query) -> Response:
        """Return a schedule and its status."""
        return await self._answer(request, "GetSchedule", schedule_pb2.GetScheduleRequest())

    async def update(self, request: Request, _: Query) -> Response:
        """Replace a schedule. The body is a Schedule."""
        message = self._of(request, schedule_pb2.UpdateScheduleRequest())
        return answer_with(await self._send(request, "UpdateSchedule", message, "schedule"))

    async def delete(self, request: Request, _: Query) -> Response:
        """Delete a schedule."""
        return await self._answer(request, "DeleteSchedule", schedule_pb2.DeleteScheduleRequest())

    async def pause(self, request: Request, _: Query) -> Response:
        """Pause a schedule."""
        return await self._answer_to_body(request, "PauseSchedule", schedule_pb2.PauseScheduleRequest())

    async def unpause(self, request: Request, _: Query) -> Response:
        """Resume a paused schedule."""
        return await self._answer_to_body(request, "UnpauseSchedule", schedule_pb2.UnpauseScheduleRequest())

    async def trigger(self, request: Request, _: Query) -> Response:
        """Start a run now."""
        return await self._answer_to_body(request, "TriggerSchedule", schedule_pb2.TriggerScheduleRequest())

    async def backfill(self, request: Request, _: Query) -> Response:
        """Start a run for each time in a range of the past."""
        return await self._answer_to_body(request, "BackfillSchedule", schedule_pb2.BackfillScheduleRequest())


def paths(front: Front) -> Paths:
    """Return the operations. The paths with a suffix come first, because an id may hold `/`."""
    schedules, pb, of_path = Schedules(front), schedule_pb2, ("schedule_id",)
    return {
        "/schedules": {
            "POST": Operation(
                "CreateSchedule",
                "Creates a schedule, or finds the one with the same user_id and request_id.",
                schedules.create,
                pb.CreateScheduleResponse,
                HTTPStatus.CREATED,
                body=pb.Schedule,
                query=_CREATE,
            ),
            "GET": Operation(
                "ListSchedules",
                "Lists schedules, the newest first.",
                schedules.list,
                pb.ListSchedulesResponse,
                query=_LIST,
            ),
        },
        "/schedules/{id:id}/pause": {
            "POST": Operation(
                "PauseSchedule",
                "Pauses a schedule. Runs that have begun go on.",
                schedules.pause,
                pb.PauseScheduleResponse,
                body=pb.PauseScheduleRequest,
                body_without=of_path,
            )
        },
        "/schedules/{id:id}/unpause": {
            "POST": Operation(
                "UnpauseSchedule",
                "Resumes a paused schedule at its next time.",
                schedules.unpause,
                pb.UnpauseScheduleResponse,
                body=pb.UnpauseScheduleRequest,
                body_without=of_path,
            )
        },
        "/schedules/{id:id}/trigger": {
            "POST": Operation(
                "TriggerSchedule",
                "Starts a run now, whatever the times are.",
                schedules.trigger,
                pb.TriggerScheduleResponse,
                body=pb.TriggerScheduleRequest,
                body_without=of_path,
            )
        },
        "/schedules/{id:id}/backfill": {
            "POST": Operation(
                "BackfillSchedule",
                "Starts a run for each time of the schedule in a range of the past.",
                schedules.backfill,
                pb.BackfillScheduleResponse,
                body=pb.BackfillScheduleRequest,
                body_without=of_path,
            )
        },
        "/schedules/{id:id}": {
            "GET": Operation(
                "GetSchedule",
                "Returns a schedule with its next times and its last runs.",
                schedules.get,
                pb.GetScheduleResponse,
            ),
            "PUT": Operation(
                "UpdateSchedule",
                "Replaces a schedule as a whole, from its next time on.",
                schedules.update,
                pb.UpdateScheduleResponse,
                body=pb.Schedule,
            ),
            "DELETE": Operation(
                "DeleteSchedule",
                "Deletes a schedule. Jobs that it has started go on.",
                schedules.delete,
                pb.DeleteScheduleResponse,
            ),
        },
    }
