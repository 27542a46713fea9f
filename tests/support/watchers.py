"""Watchers of a job, as clients write them: one that leaves and comes back, one that goes on at another gateway."""

import random
from collections.abc import Sequence

import grpc

from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import Seen


async def watch_in_pieces(
    stub: LlmServiceStub, id_: str, chance: random.Random, then: LlmServiceStub | None = None, tokens: float = 0.5
) -> Seen:
    """Watch a job, leaving and coming back after every few messages; at `then` if the gateway dies.

    `tokens` is how often it comes back with the resume token, rather than with the offset alone: 0 to 1.
    """
    seen = Seen()
    while True:
        request = llm_pb2.StreamStatusRequest(workflow_id=id_, output_offset=seen.next_offset)
        if chance.random() < tokens:
            request.resume_token = seen.resume_token
        call = stub.StreamStatus(request, timeout=60)
        left = chance.randrange(1, 30)
        try:
            async for message in call:
                seen.add(message)
                left -= 1
                if left == 0:
                    break
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or then is None:
                raise
            stub, then = then, None
            continue
        if seen.final.HasField("result"):
            return seen
        call.cancel()


async def watch_anywhere(stubs: Sequence[LlmServiceStub], id_: str) -> Seen:
    """Watch a job at the first gateway; when that breaks off, go on at the next with the token."""
    seen = Seen()
    for stub in stubs:
        request = llm_pb2.StreamStatusRequest(workflow_id=id_, resume_token=seen.resume_token)
        try:
            async for message in stub.StreamStatus(request, timeout=60):
                seen.add(message)
            break
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
    return seen


async def when_output_reaches(stub: LlmServiceStub, id_: str, size: int) -> llm_pb2.JobStatus:
    """Return the last status, which names the worker, once there are so many bytes."""
    status = llm_pb2.JobStatus()
    async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=60):
        if message.HasField("status"):
            status = message.status
        if message.next_offset >= size and status.progress.worker:
            return status
    raise AssertionError("the job ended too soon")
