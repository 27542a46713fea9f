"""Watchers of a job: one that reconnects, and one that continues at another gateway.

They use the protocol itself with the generated stub, and choose the offset, the resume token and the gateway.
"""

import random
from collections.abc import Sequence

import grpc

from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gateway.job_record import FINAL_STATES
from tests.support.jobs import PATIENCE_SECONDS, Seen


async def watch_on(
    stub: LlmServiceStub,
    id_: str,
    seen: Seen,
    token: str = "",
    *,
    most: int | None = None,
    seconds: float = PATIENCE_SECONDS,
) -> bool:
    """Watch a job from the end of `seen`, for up to `most` messages. Return True if the job has ended.

    The stream resumes at the offset, and with the token if there is one.
    """
    request = llm_pb2.StreamStatusRequest(workflow_id=id_, output_offset=seen.next_offset, resume_token=token)
    call = stub.StreamStatus(request, timeout=seconds)
    left = most
    async for message in call:
        seen.add(message)
        if left is not None and (left := left - 1) == 0:
            call.cancel()
            # The first message of a stream may have the final status and text. Then it is not the last one.
            return message.status.state in FINAL_STATES and not message.delta.text
    return bool(seen.messages) and seen.final.status.state in FINAL_STATES


async def watch_in_pieces(
    stub: LlmServiceStub, id_: str, chance: random.Random, then: LlmServiceStub | None = None, tokens: float = 0.5
) -> Seen:
    """Watch a job, and reconnect after every few messages. Continue at `then` if the gateway dies.

    `tokens` is the share of reconnects, 0 to 1, that send the resume token next to the offset.
    """
    seen = Seen()
    while True:
        token = seen.resume_token if chance.random() < tokens else ""
        try:
            if await watch_on(stub, id_, seen, token, most=chance.randrange(1, 30)):
                return seen
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or then is None:
                raise
            stub, then = then, None


async def watch_anywhere(stubs: Sequence[LlmServiceStub], id_: str) -> Seen:
    """Watch a job at the first gateway. When a stream breaks, continue at the next gateway with the token."""
    seen = Seen()
    for stub in stubs:
        try:
            await watch_on(stub, id_, seen, seen.resume_token)
            break
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
    return seen


async def when_output_reaches(stub: LlmServiceStub, id_: str, size: int) -> llm_pb2.JobStatus:
    """Return the last status, which names the worker, once the output has `size` bytes."""
    status = llm_pb2.JobStatus()
    async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=PATIENCE_SECONDS):
        if message.HasField("status"):
            status = message.status
        if message.next_offset >= size and status.progress.worker:
            return status
    raise AssertionError("the job ended before its output reached the size")
