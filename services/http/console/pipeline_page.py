"""The page of a pipeline, and what people do to the pipeline there."""

from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import Violation
from llm_pb import pipeline_pb2
from services.http.bodies import query_of
from services.http.console.forms import read_form
from services.http.console.item_page import ItemPage, id_of
from services.http.console.pipeline_view import PipelineView, result_of, tree_of
from services.http.failures import bad_request
from services.http.rest.pipeline_streams import pipeline_to
from services.http.rest.stream import PARAMETER

_ANSWERS: Final = {"yes": True, "no": False}


class PipelinePage(ItemPage):
    """The handlers."""

    place = "/console/pipelines"

    async def events(self, request: Request) -> Response:
        """Answer with the changes of a pipeline, for an EventSource."""
        return await pipeline_to(self._calls(request), self._front, request, query_of(request, (PARAMETER,)))

    async def cancel(self, request: Request) -> Response:
        """Request that a pipeline stops."""
        form = await read_form(request, self._front.settings, "reason")
        message = pipeline_pb2.CancelPipelineRequest(pipeline_id=id_of(request), reason=form.get("reason", "").strip())
        return await self._do(request, "CancelPipeline", message)

    async def answer(self, request: Request) -> Response:
        """Answer a step. Raises Failure, 400, for a form that says neither yes nor no."""
        form = await read_form(request, self._front.settings, "step", "approved")
        answer = form.get("approved", "")
        if answer not in _ANSWERS:
            raise bad_request(Violation("approved", f"must be {' or '.join(_ANSWERS)}"))
        message = pipeline_pb2.AnswerStepRequest(
            pipeline_id=id_of(request),
            path=form.get("step", ""),
            # Equal answers of two people are one answer. The second of two that differ is refused.
            answer_id=f"console-{answer}",
            approved=_ANSWERS[answer],
        )
        return await self._do(request, "AnswerStep", message)

    async def _show(self, request: Request, refused: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
        message = pipeline_pb2.GetPipelineRequest(pipeline_id=id_of(request))
        found = await self._calls(request).call("GetPipeline", message)
        return self._pages.render(
            request,
            "pipeline.html",
            status,
            refused=refused,
            pipeline=PipelineView(found.status, found.steps),
            tree=tree_of(found.steps),
            result=result_of(found.result) if found.HasField("result") else "",
        )
