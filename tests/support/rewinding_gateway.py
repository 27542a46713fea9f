"""A gateway of scripted streams: of a job that starts over after its text, of one that pauses, of one with controls.

The engine of the tests rewinds only where a worker dies and the feed loses its log, which takes a stack of its own.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from llm_pb import llm_pb2, llm_pb2_grpc

CONTROLS = ("\x1b]0;title\x07 one\r\ntwo\r", "\nthree\rover")
_RUNNING = llm_pb2.JobStatus(state=llm_pb2.JOB_STATE_RUNNING, attempt=1)
_PAUSED = llm_pb2.JobStatus(
    state=llm_pb2.JOB_STATE_QUEUED, attempt=1, progress=llm_pb2.JobProgress(stage="paused", output_tokens=3, percent=50)
)
PIECES: dict[str, list[llm_pb2.OutputDelta | llm_pb2.JobStatus]] = {
    "llmjob-a-paused": [
        _RUNNING,
        llm_pb2.OutputDelta(text="Once upon "),
        _PAUSED,
        _PAUSED,
        _RUNNING,
        llm_pb2.OutputDelta(text="a time", offset=10),
    ],
    "llmjob-a-controls": [
        llm_pb2.OutputDelta(text=CONTROLS[0]),
        llm_pb2.OutputDelta(text=CONTROLS[1], offset=len(CONTROLS[0])),
    ],
    "llmjob-a-1": [
        llm_pb2.OutputDelta(text="Once upon "),
        llm_pb2.OutputDelta(text="a time", offset=10),
        llm_pb2.OutputDelta(text=" there", offset=4, rewind=True),
        llm_pb2.OutputDelta(text=" was", offset=10),
    ],
}
ENDLESS = "llmjob-a-endless"
"""The same job that starts over, and goes on: nothing but its deltas says what its text is."""
PIECES[ENDLESS] = PIECES["llmjob-a-1"]


class RewindingGateway(llm_pb2_grpc.LlmServiceServicer):
    """Servicer of StreamStatus, and of GetJob: a job runs until somebody has read its stream."""

    def __init__(self) -> None:
        self._outputs: dict[str, str] = {}

    async def GetJob(  # type: ignore[override]
        self, request: llm_pb2.GetJobRequest, context: Any
    ) -> llm_pb2.GetJobResponse:
        output = self._outputs.get(request.workflow_id)
        state = llm_pb2.JOB_STATE_RUNNING if output is None else llm_pb2.JOB_STATE_SUCCEEDED
        status = llm_pb2.JobStatus(workflow_id=request.workflow_id, state=state)
        return llm_pb2.GetJobResponse(status=status, result=llm_pb2.JobResult(output=output or ""))

    async def ListDeliveries(  # type: ignore[override]
        self, request: llm_pb2.ListDeliveriesRequest, context: Any
    ) -> llm_pb2.ListDeliveriesResponse:
        return llm_pb2.ListDeliveriesResponse()

    async def StreamStatus(  # type: ignore[override]
        self, request: llm_pb2.StreamStatusRequest, context: Any
    ) -> AsyncIterator[llm_pb2.StreamStatusResponse]:
        output = b""
        for delta in PIECES[request.workflow_id]:
            if isinstance(delta, llm_pb2.JobStatus):
                yield llm_pb2.StreamStatusResponse(status=delta, next_offset=len(output))
                continue
            output = output[: delta.offset] + delta.text.encode()
            place = len(output)
            yield llm_pb2.StreamStatusResponse(delta=delta, next_offset=place, resume_token=f"{place}-a")
        if request.workflow_id == ENDLESS:
            await asyncio.Event().wait()
        self._outputs[request.workflow_id] = output.decode()
        status = llm_pb2.JobStatus(workflow_id=request.workflow_id, state=llm_pb2.JOB_STATE_SUCCEEDED)
        yield llm_pb2.StreamStatusResponse(status=status, result=llm_pb2.JobResult(output=output.decode()))


@asynccontextmanager
async def rewinding_gateway() -> AsyncIterator[str]:
    """Serve while the context is open, and yield the address."""
    server = grpc.aio.server()
    llm_pb2_grpc.add_LlmServiceServicer_to_server(RewindingGateway(), server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await checks.set(
        llm_pb2.DESCRIPTOR.services_by_name["LlmService"].full_name, health_pb2.HealthCheckResponse.SERVING
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
