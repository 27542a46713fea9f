"""Clients that ask for a server's health, and do not read or never leave, do not keep others from its answer."""

import asyncio
from datetime import timedelta

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from runtime.grpc_server import GrpcServer, Limits
from tests.chaos.test_unread_answers import target
from tests.support.attacks import stalled_clients
from tests.support.jobs import details_of, new_job, run_job

CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
SERVING = health_pb2.HealthCheckResponse.SERVING
ANYTHING = health_pb2.HealthCheckRequest()


async def health(address: str) -> int:
    """Return the health that a new client's Check returns."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        response = await health_pb2_grpc.HealthStub(channel).Check(ANYTHING, timeout=120)
    return int(response.status)


async def test_watches_of_health_do_not_keep_others_out(stack: Stack) -> None:
    """The server answers a hundred watches and refuses the others."""
    async with (
        target(stack, {}, max_calls="200") as attacked,
        stalled_clients(attacked.address, 4, 1000) as clients,
        asyncio.timeout(60),
    ):
        for client in clients:
            client.call(WATCH, ANYTHING, 500)
        for client in clients:
            await client.all_answered()
        assert sum(len(client.ended) for client in clients) == 2000 - 100
        async with grpc.aio.insecure_channel(attacked.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await health_pb2_grpc.HealthStub(channel).Watch(ANYTHING, timeout=60).read()
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details_of(error.value)["RetryInfo"].retry_delay.seconds > 0
        assert await health(attacked.address) == SERVING
        assert (await run_job(attacked.stub, new_job(params={"max_tokens": 5}))).states[-1] == "SUCCEEDED"


async def test_unread_answers_about_health_do_not_keep_others_out(stack: Stack) -> None:
    """The server closes each connection that leaves most of its answers unread, again and again."""

    async def attack() -> None:
        async with stalled_clients(attacked.address) as (client,):
            client.call(CHECK, ANYTHING, 1500)
            await client.closed.wait()

    async with target(stack, {}, max_calls="200") as attacked, asyncio.timeout(300):
        attacks = [asyncio.create_task(attack()) for _ in range(3)]
        while attacks:
            assert await health(attacked.address) == SERVING
            assert (await run_job(attacked.stub, new_job(params={"max_tokens": 5}))).states[-1] == "SUCCEEDED"
            attacks = [one for one in attacks if not one.done()]


async def test_a_watch_that_is_not_read_does_not_stop_health() -> None:
    """The health changes for all other clients, and the server can stop."""
    server = GrpcServer(["test"], "127.0.0.1", port := free_port(), Limits(4 << 20))
    await server.start()
    healthy = asyncio.Event()

    async def found(_: timedelta) -> bool:
        return healthy.is_set()

    following = asyncio.create_task(server.follow(found))

    async def changed(to: int) -> None:
        while await health(f"127.0.0.1:{port}") != to:  # noqa: ASYNC110  nothing notifies
            await asyncio.sleep(0.1)

    async with stalled_clients(f"127.0.0.1:{port}") as (client,), asyncio.timeout(30):
        client.call(WATCH, ANYTHING)
        await client.all_answered()
        healthy.set()
        await changed(SERVING)
        following.cancel()
        await server.drain()
        await changed(health_pb2.HealthCheckResponse.NOT_SERVING)
    await server.stop(timedelta(0))
