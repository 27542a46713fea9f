"""The paths of pipelines."""

import functools
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import pipeline_pb2
from services.http.front import Front
from services.http.rest.handlers import Handlers, Query, list_parameters, located
from services.http.rest.operations import Operation, Parameter, Paths, streamed
from services.http.rest.pipeline_streams import FOLLOW, stream_pipeline
from services.http.rest.stream import PLACE

_LIST: Final = list_parameters("pipelines", project_id=Parameter("Lists only pipelines with this label."))
_GET: Final = {"path": Parameter("Returns only the step of this path and the steps below it.")}
_STREAM: Final = {
    FOLLOW: Parameter(
        "A path of steps whose output is sent, such as rounds/*/write. It may be there up to 16 times.",
        {"type": "array", "items": {"type": "string"}},
    ),
    **PLACE,
}


class Pipelines(Handlers):
    """The handlers."""

    id_field = "pipeline_id"

    async def submit(self, request: Request, _: Query) -> Response:
        """Start a pipeline. The body is a PipelineRequest."""
        response = await self._send(request, "SubmitPipeline", pipeline_pb2.SubmitPipelineRequest(), "pipeline")
        return located(response, "pipelines", response.status.pipeline_id)

    async def list(self, request: Request, query: Query) -> Response:
        """List pipelines. The query holds the fields of ListPipelinesRequest."""
        return await self._list(request, "ListPipelines", pipeline_pb2.ListPipelinesRequest(), query, {})

    async def get(self, request: Request, query: Query) -> Response:
        """Return a pipeline, its steps and its result."""
        message = pipeline_pb2.GetPipelineRequest(path=query.get("path", [""])[0])
        return await self._answer(request, "GetPipeline", message)

    async def cancel(self, request: Request, _: Query) -> Response:
        """Request that a pipeline stops."""
        return await self._answer_to_body(request, "CancelPipeline", pipeline_pb2.CancelPipelineRequest())

    async def answer(self, request: Request, _: Query) -> Response:
        """Answer a step that waits for it."""
        return await self._answer_to_body(request, "AnswerStep", pipeline_pb2.AnswerStepRequest())


def paths(front: Front) -> Paths:
    """Return the operations. The paths with a suffix come first, because an id may hold `/`."""
    pipelines, pb, of_path = Pipelines(front), pipeline_pb2, ("pipeline_id",)
    return {
        "/pipelines": {
            "POST": Operation(
                "SubmitPipeline",
                "Starts a pipeline, or finds the one with the same user_id and request_id.",
                pipelines.submit,
                pb.SubmitPipelineResponse,
                HTTPStatus.ACCEPTED,
                body=pb.PipelineRequest,
            ),
            "GET": Operation(
                "ListPipelines",
                "Lists pipelines, open ones first.",
                pipelines.list,
                pb.ListPipelinesResponse,
                query=_LIST,
            ),
        },
        "/pipelines/{id:id}/stream": {
            "GET": streamed(
                "StreamPipeline",
                "Watches a pipeline to its end, as server-sent events whose data are StreamPipelineResponse.",
                functools.partial(stream_pipeline, front),
                pb.StreamPipelineResponse,
                _STREAM,
            )
        },
        "/pipelines/{id:id}/cancel": {
            "POST": Operation(
                "CancelPipeline",
                "Requests that a pipeline stops.",
                pipelines.cancel,
                pb.CancelPipelineResponse,
                body=pb.CancelPipelineRequest,
                body_without=of_path,
            )
        },
        "/pipelines/{id:id}/answer": {
            "POST": Operation(
                "AnswerStep",
                "Answers a step that waits for an answer.",
                pipelines.answer,
                pb.AnswerStepResponse,
                body=pb.AnswerStepRequest,
                body_without=of_path,
            )
        },
        "/pipelines/{id:id}": {
            "GET": Operation(
                "GetPipeline",
                "Returns a pipeline, its steps and its result.",
                pipelines.get,
                pb.GetPipelineResponse,
                query=_GET,
            )
        },
    }
