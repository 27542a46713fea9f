"""The page of a batch, and what people do to the batch there."""

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import batch_pb2
from services.http.bodies import query_of
from services.http.console.batch_view import BatchView
from services.http.console.forms import read_form
from services.http.console.item_page import ItemPage, id_of
from services.http.rest.batch_streams import status_to
from services.http.rest.stream import PARAMETER


class BatchPage(ItemPage):
    """The handlers."""

    place = "/console/batches"

    async def events(self, request: Request) -> Response:
        """Answer with the statuses of a batch, for an EventSource."""
        return await status_to(self._calls(request), self._front, request, query_of(request, (PARAMETER,)))

    async def cancel(self, request: Request) -> Response:
        """Request that a batch stops."""
        form = await read_form(request, self._front.settings, "reason")
        message = batch_pb2.CancelBatchRequest(batch_id=id_of(request), reason=form.get("reason", "").strip())
        return await self._do(request, "CancelBatch", message)

    async def _show(self, request: Request, refused: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
        message = batch_pb2.GetBatchRequest(batch_id=id_of(request))
        found = await self._calls(request).call("GetBatch", message)
        return self._pages.render(request, "batch.html", status, batch=BatchView(found.status), refused=refused)
