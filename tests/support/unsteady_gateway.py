"""A gateway in front of a real one, whose streams end early or fall silent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc


class Turn(NamedTuple):
    """How an UnsteadyGateway serves one stream."""

    messages: int | None = None
    """Number of messages after which the stream ends. None: it ends after all messages."""
    fails: bool = True
    """True if the stream ends with UNAVAILABLE, False if it ends with OK."""
    silent: bool = False
    """True if the stream stays open without a message instead of ending."""
    knows_tokens: bool = True
    """True if the gateway has resume tokens, False for an earlier version."""
    retry_delay: timedelta | None = None
    """Delay of the RetryInfo with which the stream fails."""
    full: bool = False
    """True if the stream fails with RESOURCE_EXHAUSTED instead of UNAVAILABLE."""
    reset: bool = False
    """True if the stream fails as one that a proxy resets: with INTERNAL, and without details."""
    rewinds: bool = False
    """True if another text replaces the output before the stream ends."""


class UnsteadyGateway(llm_pb2_grpc.LlmServiceServicer):
    """Servicer that serves each StreamStatus by the next of its turns. The last turn repeats.

    The calls that a front makes for a request of OpenAI's API go on to the real gateway.
    """

    def __init__(self, gateway: llm_pb2_grpc.LlmServiceStub, *turns: Turn) -> None:
        self.address = ""
        self.streams = 0
        """Number of streams that were opened."""
        self.answers = asyncio.Event()
        """Whether GetStatus answers."""
        self.answers.set()
        self.asked = asyncio.Event()
        """Whether GetStatus was called."""
        self.submitted: list[str] = []
        """The ids of the jobs that were submitted."""
        self._gateway = gateway
        self._turns = list(turns)
        for method in ("GetJob", "DeleteJob", "GetDeletion"):
            setattr(self, method, self._passing_on(method))

    def plan(self, *turns: Turn) -> None:
        """Serve the next streams by these turns."""
        self._turns = list(turns)

    def _passing_on(self, method: str) -> Any:
        async def pass_on(request: Any, context: Any) -> Any:
            try:
                return await getattr(self._gateway, method)(request)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details(), tuple(error.trailing_metadata()))

        return pass_on

    async def Submit(  # type: ignore[override]
        self, request: llm_pb2.SubmitRequest, context: Any
    ) -> llm_pb2.SubmitResponse:
        response: llm_pb2.SubmitResponse = await self._gateway.Submit(request)
        self.submitted.append(response.workflow_id)
        return response

    async def GetStatus(  # type: ignore[override]
        self, request: llm_pb2.GetStatusRequest, context: Any
    ) -> llm_pb2.GetStatusResponse:
        self.asked.set()
        await self.answers.wait()
        response: llm_pb2.GetStatusResponse = await self._passing_on("GetStatus")(request, context)
        return response

    async def StreamStatus(  # type: ignore[override]
        self, request: llm_pb2.StreamStatusRequest, context: Any
    ) -> AsyncIterator[llm_pb2.StreamStatusResponse]:
        self.streams += 1
        turn = self._turns.pop(0) if len(self._turns) > 1 else self._turns[0]
        if not turn.knows_tokens:
            request.ClearField("resume_token")
        count = 0
        if turn.messages != 0:
            async for message in self._gateway.StreamStatus(request):
                if not turn.knows_tokens:
                    message.ClearField("resume_token")
                yield message
                count += 1
                if count == turn.messages:
                    break
        if turn.rewinds:
            delta = llm_pb2.OutputDelta(text="another", rewind=True)
            yield llm_pb2.StreamStatusResponse(delta=delta, next_offset=7, rewinds=1)
        if turn.silent:
            await asyncio.Event().wait()
        if turn.reset:
            await context.abort(grpc.StatusCode.INTERNAL, "the stream was reset")
        if turn.fails:
            code = code_pb2.RESOURCE_EXHAUSTED if turn.full else code_pb2.UNAVAILABLE
            message = "too many watchers" if turn.full else "the connection broke"
            # Go takes the message from here.
            status = status_pb2.Status(code=code, message=message)
            if turn.retry_delay is not None:
                status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=turn.retry_delay))
            trailers = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(grpc.StatusCode[code_pb2.Code.Name(code)], message, trailers)


@asynccontextmanager
async def serving(stack: Stack, *turns: Turn) -> AsyncIterator[UnsteadyGateway]:
    """Serve an UnsteadyGateway in front of the stack's gateway while the context is open, and yield it."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        server = grpc.aio.server()
        gateway = UnsteadyGateway(llm_pb2_grpc.LlmServiceStub(channel), *turns)
        llm_pb2_grpc.add_LlmServiceServicer_to_server(gateway, server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await checks.set(
            llm_pb2.DESCRIPTOR.services_by_name["LlmService"].full_name, health_pb2.HealthCheckResponse.SERVING
        )
        gateway.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield gateway
        finally:
            await server.stop(None)
