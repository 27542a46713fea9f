"""The methods of PipelineService: each calls the object that implements it. See services.gateway.servicer."""

from collections.abc import AsyncGenerator
from typing import Any

import grpc

from llm_pb import pipeline_pb2, pipeline_pb2_grpc
from runtime.answers import Answers
from runtime.grpc_auth import current_caller
from services.gateway.job_traces import link_call
from services.gateway.pipelines.answers import StepAnswers
from services.gateway.pipelines.listing import PipelineListing
from services.gateway.pipelines.live import LiveSteps, with_live
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.pipelines.streams import PipelineStreams
from services.gateway.pipelines.submission import PipelineSubmission

_Context = grpc.aio.ServicerContext[Any, Any]


class PipelineServicer(pipeline_pb2_grpc.PipelineServiceServicer):
    """The methods of pipeline.proto."""

    def __init__(
        self,
        submission: PipelineSubmission,
        reader: PipelineReader,
        live: LiveSteps,
        streams: PipelineStreams,
        listing: PipelineListing,
        step_answers: StepAnswers,
        answers: Answers,
    ) -> None:
        self._submission = submission
        self._reader = reader
        self._live = live
        self._streams = streams
        self._listing = listing
        self._step_answers = step_answers
        self._answers = answers

    async def SubmitPipeline(
        self, request: pipeline_pb2.SubmitPipelineRequest, context: _Context
    ) -> pipeline_pb2.SubmitPipelineResponse:
        """See pipeline.proto."""
        return pipeline_pb2.SubmitPipelineResponse(status=await self._submission.submit(current_caller(), request))

    async def GetPipeline(
        self, request: pipeline_pb2.GetPipelineRequest, context: _Context
    ) -> pipeline_pb2.GetPipelineResponse:
        """See pipeline.proto."""
        description = await self._reader.describe(current_caller(), request.pipeline_id)
        await link_call(description)
        record = await self._reader.record_of(description)
        live = await self._live.read(description, record.nodes)
        below = f"{request.path}/"
        steps = [
            with_live(node, live)
            for node in record.nodes
            if not request.path or node.step.path == request.path or node.step.path.startswith(below)
        ]
        result = record.result if record.HasField("result") else None
        response = pipeline_pb2.GetPipelineResponse(status=record.status, steps=steps, result=result)
        await self._answers.of(context).reserve(response.ByteSize())
        return response

    def StreamPipeline(
        self, request: pipeline_pb2.StreamPipelineRequest, context: _Context
    ) -> AsyncGenerator[pipeline_pb2.StreamPipelineResponse, None]:
        """See pipeline.proto."""
        return self._streams.stream(current_caller(), request, self._answers.of(context))

    async def CancelPipeline(
        self, request: pipeline_pb2.CancelPipelineRequest, context: _Context
    ) -> pipeline_pb2.CancelPipelineResponse:
        """See pipeline.proto."""
        return pipeline_pb2.CancelPipelineResponse(status=await self._submission.cancel(current_caller(), request))

    async def AnswerStep(
        self, request: pipeline_pb2.AnswerStepRequest, context: _Context
    ) -> pipeline_pb2.AnswerStepResponse:
        """See pipeline.proto."""
        return pipeline_pb2.AnswerStepResponse(step=await self._step_answers.answer(current_caller(), request))

    async def ListPipelines(
        self, request: pipeline_pb2.ListPipelinesRequest, context: _Context
    ) -> pipeline_pb2.ListPipelinesResponse:
        """See pipeline.proto."""
        response = await self._listing.list_page(current_caller(), request)
        await self._answers.of(context).reserve(response.ByteSize())
        return response
