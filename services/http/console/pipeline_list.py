"""The list of pipelines."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import pipeline_pb2
from services.http.console.caller import caller_of
from services.http.console.listing import PAGE_SIZE, ListQuery
from services.http.console.pages import Pages
from services.http.console.pipeline_view import PipelineView
from services.http.front import Front

_FILTERS: Final = ("user_id", "project_id")


class PipelineList:
    """The handler."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show a page of pipelines. The filters are in the URL."""
        query = ListQuery.of(request, _FILTERS)
        message = pipeline_pb2.ListPipelinesRequest(**query.filters, page_size=PAGE_SIZE, page_token=query.page_token)
        listed = await self._front.gateway.in_name_of(caller_of(request)).call("ListPipelines", message)
        return self._pages.render(
            request,
            "pipelines.html",
            pipelines=[PipelineView(status) for status in listed.pipelines],
            **query.shown(listed.next_page_token),
        )
