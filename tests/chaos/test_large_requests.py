"""Large requests, whole and incomplete ones, cost a gateway a bounded amount of memory."""

import asyncio
import contextlib

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from tests.chaos.test_unread_answers import MB, REFLECTION, STREAM_STATUS, target
from tests.support.attacks import stalled_clients
from tests.support.jobs import details_of, new_job, run_job
from tests.support.memory import peak_bytes, resident_bytes

SUBMIT = "/llm.v1.LlmService/Submit"
CHECK = "/grpc.health.v1.Health/Check"


def large_request() -> llm_pb2.SubmitRequest:
    """Return a request of 1.9 MB for a model that no worker serves and whose prompts are not tokenised."""
    return llm_pb2.SubmitRequest(job=new_job("x" * 1_900_000, model="idle"))


@pytest.mark.parametrize(
    ("method", "withheld"),
    [(SUBMIT, 0), (SUBMIT, 1), *(pytest.param(method, 1, marks=pytest.mark.long) for method in (CHECK, REFLECTION))],
    ids=lambda value: str(value)[-10:],
)
async def test_a_gateway_survives_many_large_requests(stack: Stack, method: str, withheld: int) -> None:
    """With 600 requests of 1.9 MB, whole or without their last byte, it stays below 512 MB and serves others."""
    async with target(stack, {}) as attacked, stalled_clients(attacked.address, 20) as clients, asyncio.timeout(170):
        body = large_request().SerializeToString()
        uploads = (client.upload(method, body, 30, withheld=withheld) for client in clients)
        attack = asyncio.gather(*uploads)
        seen = await run_job(attacked.stub, new_job(params={"max_tokens": 5}))
        assert seen.final.result.output.encode() == seen.output
        await attack
        assert peak_bytes(attacked.gateway) < 512 * MB


async def test_a_large_request_without_room_is_refused(stack: Stack) -> None:
    """The refusal is RESOURCE_EXHAUSTED with RetryInfo. Other requests of the same size are served meanwhile."""
    async with target(stack, {}, unread_bytes="8388608") as attacked:
        request = large_request()
        calls = [attacked.stub.Submit(request, timeout=100) for _ in range(30)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        refused = [error for error in outcomes if isinstance(error, grpc.aio.AioRpcError)]
        assert 0 < len(refused) < len(calls)
        for error in refused:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details_of(error)["RetryInfo"].retry_delay.seconds > 0


async def test_what_follows_a_request_stays_at_the_client(stack: Stack) -> None:
    """The server's flow control holds back 10 MB more on each of 20 streams, because no handler reads them."""
    async with target(stack, {}) as attacked, stalled_clients(attacked.address, 1, 100_000) as (client,):
        job = new_job(model="idle")
        id_ = (await attacked.stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
        request = llm_pb2.StreamStatusRequest(workflow_id=id_).SerializeToString()
        before = resident_bytes(attacked.gateway)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await client.upload(STREAM_STATUS, request, 20, followed_by=bytes(10_000_000))
        assert len(client.begun) == 20
        assert not client.ended
        assert resident_bytes(attacked.gateway) - before < 20 * MB
