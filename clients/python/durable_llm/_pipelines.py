"""The pipelines of AsyncClient."""

import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from durable_llm._streaming_stub import StreamingStub
from llm_pb import pipeline_pb2


class AsyncPipelines:
    """The pipelines of the caller's tenant."""

    def __init__(self, stub: StreamingStub) -> None:
        self._stub = stub

    async def submit(
        self, pipeline: pipeline_pb2.PipelineRequest | None = None, /, **fields: Any
    ) -> pipeline_pb2.PipelineStatus:
        """Start a pipeline and return its status. One that was started before under its key is returned.

        A pipeline is a PipelineRequest, or its fields by name: `user_id="alice", refine={"topic": …}`. One without a
        request_id gets a random one. Raises ApiError, and ValueError or TypeError for a field that it does not have.
        """
        request = pipeline_pb2.PipelineRequest(**fields)
        if pipeline is not None:
            request.MergeFrom(pipeline)
        if not request.request_id:
            request.request_id = uuid.uuid4().hex
        submit = pipeline_pb2.SubmitPipelineRequest(pipeline=request)
        response: pipeline_pb2.SubmitPipelineResponse = await self._stub.unary("SubmitPipeline", submit)
        return response.status

    async def get(self, pipeline_id: str, path: str = "") -> pipeline_pb2.GetPipelineResponse:
        """Return a pipeline, its steps and its result. `path` limits the steps to those below it. Raises ApiError."""
        request = pipeline_pb2.GetPipelineRequest(pipeline_id=pipeline_id, path=path)
        response: pipeline_pb2.GetPipelineResponse = await self._stub.unary("GetPipeline", request)
        return response

    async def watch(
        self, pipeline_id: str, follow: Iterable[str] = (), cursor: str = ""
    ) -> AsyncGenerator[pipeline_pb2.StreamPipelineResponse, None]:
        """Yield the messages of StreamPipeline to the last one, which has the final status.

        `follow` are paths of steps whose output comes, such as "rounds/*/write". A stream that breaks continues by its
        cursor; a cursor continues in another process, too. Upon a message with `rewind` the steps of those before it
        are void. Raises ApiError.
        """
        patterns = [*follow]

        def request() -> pipeline_pb2.StreamPipelineRequest:
            return pipeline_pb2.StreamPipelineRequest(pipeline_id=pipeline_id, follow=patterns, cursor=cursor)

        async with aclosing(self._stub.messages("StreamPipeline", request)) as messages:
            async for message in messages:
                cursor = message.cursor or cursor
                yield message

    async def result(self, pipeline_id: str) -> pipeline_pb2.GetPipelineResponse:
        """Wait until a pipeline has ended; return it as get() does. Raises ApiError."""
        async with aclosing(self.watch(pipeline_id)) as messages:
            async for _ in messages:
                pass
        return await self.get(pipeline_id)

    async def cancel(self, pipeline_id: str, reason: str = "") -> pipeline_pb2.PipelineStatus:
        """Request that a pipeline stops; return its status. What its jobs have generated is kept. Raises ApiError."""
        request = pipeline_pb2.CancelPipelineRequest(pipeline_id=pipeline_id, reason=reason)
        response: pipeline_pb2.CancelPipelineResponse = await self._stub.unary("CancelPipeline", request)
        return response.status

    async def answer(
        self, pipeline_id: str, path: str, *, approved: bool, answer_id: str = ""
    ) -> pipeline_pb2.StepStatus:
        """Answer a step that needs an answer; return the step. Without an answer_id it gets a random one.

        Raises ApiError.
        """
        request = pipeline_pb2.AnswerStepRequest(
            pipeline_id=pipeline_id, path=path, answer_id=answer_id or uuid.uuid4().hex, approved=approved
        )
        response: pipeline_pb2.AnswerStepResponse = await self._stub.unary("AnswerStep", request)
        return response.step

    async def list(self, **filters: Any) -> AsyncGenerator[pipeline_pb2.PipelineStatus, None]:
        """Yield pipelines, open ones first, page after page. The filters are the fields of ListPipelinesRequest.

        Raises ApiError, and ValueError for a filter that ListPipelinesRequest does not have.
        """
        request = pipeline_pb2.ListPipelinesRequest(**filters)
        while True:
            response: pipeline_pb2.ListPipelinesResponse = await self._stub.unary("ListPipelines", request)
            for status in response.pipelines:
                yield status
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token
