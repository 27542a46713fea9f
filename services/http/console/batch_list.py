"""The list of batches, with a form that creates one."""

from collections.abc import Mapping
from typing import ClassVar, Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import Violation
from llm_pb import batch_pb2
from services.http.console.batch_view import BatchView
from services.http.console.formats import batch_state
from services.http.console.listing import PAGE_SIZE, ListQuery
from services.http.console.new_work import CreatingList, Refused
from services.http.failures import bad_request
from services.http.gateway import Calls

_STATES: Final = {
    value.name: batch_state(value.number) for value in batch_pb2.BatchState.DESCRIPTOR.values if value.number
}
_FILTERS: Final = ("state", "user_id", "project_id")


class BatchList(CreatingList):
    """The handlers."""

    place: ClassVar = "/console/batches"
    fields: ClassVar = ("input", "project_id")

    async def _create(self, calls: Calls, form: Mapping[str, str]) -> str:
        batch = batch_pb2.BatchRequest()
        batch.user_id, batch.request_id = form.get("user_id", ""), form.get("request_id", "")
        batch.project_id, batch.input.file_id = form.get("project_id", ""), form.get("input", "")
        created = await calls.call("CreateBatch", batch_pb2.CreateBatchRequest(batch=batch))
        id_: str = created.status.batch_id
        return id_

    async def _show(self, request: Request, refused: Refused | None = None) -> Response:
        """Show the page. The filters are in the URL. Raises Failure, 400, for a state that does not exist."""
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
        listed = await self._calls(request).call("ListBatches", message)
        return self._render(
            request,
            "batches.html",
            refused,
            batches=[BatchView(one) for one in listed.batches],
            states=_STATES,
            **query.shown(listed.next_page_token),
        )
