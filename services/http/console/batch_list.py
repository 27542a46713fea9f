"""The list of batches."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import Violation
from llm_pb import batch_pb2
from services.http.console.batch_view import BatchView
from services.http.console.caller import caller_of
from services.http.console.formats import batch_state
from services.http.console.listing import PAGE_SIZE, ListQuery
from services.http.console.pages import Pages
from services.http.failures import bad_request
from services.http.front import Front

_STATES: Final = {
    value.name: batch_state(value.number) for value in batch_pb2.BatchState.DESCRIPTOR.values if value.number
}
_FILTERS: Final = ("state", "user_id", "project_id")


class BatchList:
    """The handler."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show a page of batches. The filters are in the URL. Raises Failure, 400, for a state that does not exist."""
        query = ListQuery.of(request, _FILTERS)
        filters = query.filters
        if filters["state"] and filters["state"] not in _STATES:
            raise bad_request(Violation("state", f"must be one of {', '.join(_STATES)}"))
        message = batch_pb2.ListBatchesRequest(
            user_id=filters["user_id"],
            project_id=filters["project_id"],
            states=[batch_pb2.BatchState.Value(filters["state"])] if filters["state"] else [],
            page_size=PAGE_SIZE,
            page_token=query.page_token,
        )
        listed = await self._front.gateway.in_name_of(caller_of(request)).call("ListBatches", message)
        return self._pages.render(
            request,
            "batches.html",
            batches=[BatchView(status) for status in listed.batches],
            states=_STATES,
            **query.shown(listed.next_page_token),
        )
