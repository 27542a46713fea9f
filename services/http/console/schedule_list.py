"""The list of schedules."""

import json

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import schedule_pb2
from services.http.console.caller import caller_of
from services.http.console.listing import PAGE_SIZE, ListQuery
from services.http.console.pages import Pages
from services.http.console.snippets import base_of, curl_post
from services.http.front import Front

_FIRST = {
    "user_id": "me",
    "request_id": "nightly",
    "times": {"cron": ["0 6 * * MON-FRI"], "time_zone": "Europe/Berlin"},
    "job": {"model": "docstrings", "prompt": "Return the"},
}


class ScheduleList:
    """The handler."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show a page of schedules. The filter is in the URL."""
        query = ListQuery.of(request, ("user_id",))
        message = schedule_pb2.ListSchedulesRequest(
            user_id=query.filters["user_id"], page_size=PAGE_SIZE, page_token=query.page_token
        )
        listed = await self._front.gateway.in_name_of(caller_of(request)).call("ListSchedules", message)
        text = json.dumps(_FIRST, indent=2)
        return self._pages.render(
            request,
            "schedules.html",
            schedules=listed.schedules,
            first_schedule=curl_post(f"{base_of(request)}/schedules", text, credential=bool(caller_of(request))),
            **query.shown(listed.next_page_token),
        )
