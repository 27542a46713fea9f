"""Calls that cost their client a few bytes, and bring no request: each is ended, and nobody else notices."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from deploy.local.stack import Stack
from tests.attacks import stalled_clients
from tests.conftest import new_job, run_job
from tests.test_unread_answers import GET_STATUS, STREAM_STATUS, target

CHECK = "/grpc.health.v1.Health/Check"
METHODS = [GET_STATUS, STREAM_STATUS, CHECK]


async def none() -> AsyncIterator[bytes]:
    """Send nothing and say that this is all."""
    for request in ():
        yield request


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_that_ends_without_a_request_is_answered(stack: Stack, method: str) -> None:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        call = channel.stream_stream(method)(none(), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError, match="without a request") as refused:
            await call.read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_calls_whose_request_does_not_come_are_ended(stack: Stack) -> None:
    """After GATEWAY_REQUEST_TIMEOUT: more of them than the gateway takes do not keep others out for longer."""
    async with (
        target(stack, {}, request_timeout="PT1S", max_calls="200") as attacked,
        stalled_clients(attacked.address, 3) as clients,
        asyncio.timeout(60),
    ):
        for client, method in zip(clients, METHODS, strict=True):
            client.call_without_request(method, 500)
        for client in clients:
            await client.all_ended()
            assert not client.closed.is_set()
        assert (await run_job(attacked.stub, new_job(params={"max_tokens": 5}))).states[-1] == "SUCCEEDED"
