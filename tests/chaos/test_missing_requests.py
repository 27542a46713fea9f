"""A call without a request costs its client a few bytes. The server ends each, and other clients are not affected.

A client that is given no iterator of requests writes none and leaves the stream of requests open.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from runtime.grpc_server import GrpcServer, Limits
from tests.chaos.test_unread_answers import GET_STATUS, REFLECTION, STREAM_STATUS, target
from tests.support.attacks import stalled_clients
from tests.support.jobs import details_of, new_job, run_job
from tests.support.scrapes import Scrape, scrape_until

CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
METHODS = [GET_STATUS, STREAM_STATUS, CHECK]
PATIENCE = 300


async def none() -> AsyncIterator[bytes]:
    """Yield no request and end the stream of requests."""
    for request in ():
        yield request


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_that_ends_without_a_request_is_answered(stack: Stack, method: str) -> None:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        call = channel.stream_stream(method)(none(), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError, match="without a request") as refused:
            await call.read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(refused.value)["ErrorInfo"].reason == "INVALID_REQUEST"
    assert "without a request" in details_of(refused.value)["BadRequest"].field_violations[0].description


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_whose_request_is_late_is_answered(stack: Stack, method: str) -> None:
    async with (
        target(stack, {}, request_timeout="PT0.3S") as attacked,
        grpc.aio.insecure_channel(attacked.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=r"no request has come within 0\.3 s") as refused:
            await channel.stream_stream(method)(timeout=20).read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(refused.value)["ErrorInfo"].reason == "INVALID_REQUEST"


async def too_large() -> AsyncIterator[bytes]:
    """Yield one request that is larger than GATEWAY_MAX_MESSAGE_BYTES."""
    yield bytes(5 << 20)


async def test_calls_refused_for_their_requests_are_measured(stack: Stack) -> None:
    """They count by method and code, like other calls. Of the frequent health checks only refusals count."""

    def counted(found: Scrape) -> dict[tuple[str, ...], float]:
        return found.by("rpc_server_call_duration_seconds_count", "rpc_method", "rpc_response_status_code")

    expected = {(method[1:], "INVALID_ARGUMENT"): 2 for method in METHODS}
    # gRPC itself refuses requests that are too large, and reports them to the server as cancelled.
    expected |= {(method[1:], "CANCELLED"): 1 for method in METHODS if method != CHECK}
    expected[WATCH[1:], "RESOURCE_EXHAUSTED"] = 3
    async with (
        target(stack, {}, request_timeout="PT2S") as attacked,
        grpc.aio.insecure_channel(attacked.address) as channel,
        stalled_clients(attacked.address, window=1000) as (client,),
        asyncio.timeout(100),
    ):
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        for method in METHODS:
            for requests in (none(), None, too_large()):
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.stream_stream(method)(requests, timeout=20).read()
        client.call(WATCH, health_pb2.HealthCheckRequest(), 100 + 3)
        await client.until_ended(3)
        found = await scrape_until(
            stack, lambda found: sum(counted(found).values()) >= sum(expected.values()), attacked.gateway.name
        )
        measured = counted(found)
        # On a busy machine the time limit may come before gRPC's refusal.
        for method in METHODS:
            late = measured.get((method[1:], "INVALID_ARGUMENT"), 0) - 2
            if late > 0:
                measured[method[1:], "INVALID_ARGUMENT"] -= late
                if method != CHECK:
                    measured[method[1:], "CANCELLED"] = measured.get((method[1:], "CANCELLED"), 0) + late
        assert measured == expected


async def test_calls_without_a_request_make_room(stack: Stack) -> None:
    """The oldest calls get RESOURCE_EXHAUSTED with RetryInfo, long before GATEWAY_REQUEST_TIMEOUT."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel, asyncio.timeout(15):
        reading = [asyncio.ensure_future(channel.stream_stream(CHECK)().read()) for _ in range(100)]
        ended, waiting = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        for call in ended:
            error = call.exception()
            assert isinstance(error, grpc.aio.AioRpcError)
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details_of(error)["RetryInfo"].retry_delay.seconds > 0
        for call in waiting:
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_calls_whose_request_does_not_come_are_ended(stack: Stack) -> None:
    """They end after GATEWAY_REQUEST_TIMEOUT, so even more than GATEWAY_MAX_CALLS do not keep others out for longer."""
    async with (
        # On a busy machine the requests of the job, too, come late.
        target(stack, {}, request_timeout="PT5S", max_calls="200") as attacked,
        stalled_clients(attacked.address, 3) as clients,
        asyncio.timeout(PATIENCE),
    ):
        for client, method in zip(clients, METHODS, strict=True):
            client.call_without_request(method, 500)
        for client in clients:
            await client.all_ended()
            assert not client.closed.is_set()
        assert (await run_job(attacked.stub, new_job(params={"max_tokens": 5}))).states[-1] == "SUCCEEDED"


@pytest.mark.long
async def test_calls_without_a_request_do_not_keep_others_out(stack: Stack) -> None:
    """Jobs are served while such calls exceed GATEWAY_MAX_CALLS. Their timeout is longer than this test."""

    async def attack(method: str) -> None:
        while True:
            async with stalled_clients(attacked.address) as (client,):
                client.call_without_request(method, 1000)
                while not client.closed.is_set():
                    ended = len(client.ended)
                    await client.until_ended(ended + 1)
                    begun.set()
                    client.call_without_request(method, len(client.ended) - ended)

    begun = asyncio.Event()
    async with (
        target(stack, {}, request_timeout="PT10M", max_calls="200") as attacked,
        asyncio.timeout(PATIENCE),
        asyncio.TaskGroup() as group,
    ):
        attacks = [group.create_task(attack(method)) for method in METHODS]
        await begun.wait()
        for _ in range(3):
            assert (await run_job(attacked.stub, new_job(params={"max_tokens": 5}))).states[-1] == "SUCCEEDED"
            async with grpc.aio.insecure_channel(attacked.address) as channel:
                health = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=PATIENCE
                )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert not any(task.done() for task in attacks)
        for task in attacks:
            task.cancel()


async def test_a_stream_of_requests_may_not_be_idle() -> None:
    """Reflection serves few streams at a time, so an idle stream ends to make room for others."""
    limits = Limits(4 << 20, request_idle=timedelta(seconds=0.5))
    server = GrpcServer(["test"], "127.0.0.1", port := free_port(), limits, reflection=True)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(REFLECTION)(timeout=30)
        with pytest.raises(grpc.aio.AioRpcError, match=r"no request has come within 0\.5 s"):
            await call.read()
    await server.stop(timedelta(0))


async def test_a_method_ends_its_call_although_its_next_request_is_late(caplog: pytest.LogCaptureFixture) -> None:
    """A call has one end. A second one would be an error of the server, and the client might wait for ever."""
    server = GrpcServer(
        ["test"], "127.0.0.1", port := free_port(), Limits(4 << 20, request_idle=timedelta(seconds=0.2))
    )

    async def gives_up(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await asyncio.wait({asyncio.ensure_future(anext(requests))})
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the end of the method")
        raise AssertionError

    handler = grpc.stream_unary_rpc_method_handler(gives_up)
    server.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Upload": handler}),))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.stream_unary("/test.Test/Upload")(timeout=30)
    assert (refused.value.code(), refused.value.details()) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the end of the method",
    )
    await server.stop(timedelta(0))
    assert not [record for record in caplog.records if record.exc_info]
