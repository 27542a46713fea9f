"""The list of schedules, with a form that creates one."""

import json
from collections.abc import Mapping
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import schedule_pb2
from services.http.console.caller import caller_of
from services.http.console.listing import PAGE_SIZE, ListQuery
from services.http.console.new_work import CreatingList, Refused
from services.http.console.snippets import base_of, curl_post
from services.http.gateway import Calls

_FIRST = {
    "user_id": "me",
    "request_id": "nightly",
    "times": {"cron": ["0 6 * * MON-FRI"], "time_zone": "Europe/Berlin"},
    "job": {"model": "docstrings", "prompt": "Return the"},
}


class ScheduleList(CreatingList):
    """The handlers."""

    place: ClassVar = "/console/schedules"
    fields: ClassVar = ("model", "prompt", "cron", "time_zone")

    async def _create(self, calls: Calls, form: Mapping[str, str]) -> str:
        schedule = schedule_pb2.Schedule()
        schedule.user_id, schedule.request_id = form.get("user_id", ""), form.get("request_id", "")
        schedule.job.model, schedule.job.prompt = form.get("model", ""), form.get("prompt", "")
        schedule.times.cron.append(form.get("cron", ""))
        schedule.times.time_zone = form.get("time_zone", "")
        created = await calls.call("CreateSchedule", schedule_pb2.CreateScheduleRequest(schedule=schedule))
        id_: str = created.status.schedule_id
        return id_

    async def _show(self, request: Request, refused: Refused | None = None) -> Response:
        """Show the page. The filter is in the URL."""
        query = ListQuery.of(request, ("user_id",))
        message = schedule_pb2.ListSchedulesRequest(
            user_id=query.filters["user_id"], page_size=PAGE_SIZE, page_token=query.page_token
        )
        listed = await self._calls(request).call("ListSchedules", message)
        text = json.dumps(_FIRST, indent=2)
        return self._render(
            request,
            "schedules.html",
            refused,
            schedules=listed.schedules,
            first_schedule=curl_post(f"{base_of(request)}/schedules", text, credential=bool(caller_of(request))),
            **query.shown(listed.next_page_token),
        )
