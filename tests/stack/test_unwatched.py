"""A job that asks to be cancelled when nobody watches it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job, watch

LEASE = Duration(seconds=10)
TOTAL = llm_pb2.JobTimeouts(total=Duration(seconds=2000 * LEASE.seconds))
LONG = {"max_tokens": 8000, "min_tokens": 8000}


async def submit(stub: LlmServiceStub, **changes: object) -> str:
    # A total time so short that it does not prolong the lease.
    job = new_job(cancel_if_unwatched=LEASE, timeouts=TOTAL, **changes)
    return (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id


async def until_ended(stub: LlmServiceStub, id_: str) -> llm_pb2.JobStatus:
    """Poll the job until it has ended: a stream would watch it."""
    async with asyncio.timeout(120):
        while True:
            response = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
            if response.status.state >= llm_pb2.JOB_STATE_SUCCEEDED:
                return response.status
            await asyncio.sleep(0.2)


def assert_cancelled_unwatched(status: llm_pb2.JobStatus, since: float) -> None:
    assert status.state == llm_pb2.JOB_STATE_CANCELLED
    assert status.error.message == "nobody has watched the job for 10 s"
    assert time.time() - since >= LEASE.seconds - 0.5


@pytest.fixture
async def second(stack: Stack) -> AsyncIterator[LlmServiceStub]:
    """A gateway of its own, to be killed."""
    gateway = stack.add("gateway")
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        stub = LlmServiceStub(channel)
        stub.kill = gateway.kill  # type: ignore[attr-defined]
        yield stub
    await gateway.kill()


async def test_a_job_that_nobody_watches_is_cancelled(stub: LlmServiceStub) -> None:
    """Whether it waits for a worker or runs."""
    began = time.time()
    ids = [await submit(stub, model="idle"), await submit(stub, params=LONG)]
    for status in await asyncio.gather(*(until_ended(stub, id_) for id_ in ids)):
        assert_cancelled_unwatched(status, began)


async def test_a_watched_job_goes_on_until_its_watchers_have_left(stub: LlmServiceStub) -> None:
    """One watcher follows the other, and there are three leases of time."""
    id_ = await submit(stub, model="idle")
    until = time.time() + 3 * LEASE.seconds
    while (left := until - time.time()) > 0:
        request = llm_pb2.StreamStatusRequest(workflow_id=id_)
        call = stub.StreamStatus(request, timeout=min(left, 1.3 * LEASE.seconds))
        with suppress(grpc.aio.AioRpcError):
            async for message in call:
                assert message.status.state in (llm_pb2.JOB_STATE_UNSPECIFIED, llm_pb2.JOB_STATE_QUEUED)
        assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    # The last renewal was at most half a lease before the last watcher left.
    assert_cancelled_unwatched(await until_ended(stub, id_), until - LEASE.seconds / 2)


async def test_a_gateway_that_is_killed_watches_no_longer(stub: LlmServiceStub, second: LlmServiceStub) -> None:
    id_ = await submit(second, model="idle")
    watching = asyncio.create_task(watch(second, id_))
    await asyncio.sleep(0.6 * LEASE.seconds)  # into the lease, when the gateway has renewed it
    await second.kill()  # type: ignore[attr-defined]
    killed = time.time()
    with pytest.raises(grpc.aio.AioRpcError):
        await watching
    assert_cancelled_unwatched(await until_ended(stub, id_), killed - LEASE.seconds / 2)


async def test_a_job_that_ends_in_time_costs_no_signal_and_keeps_its_result(stub: LlmServiceStub) -> None:
    id_ = await submit(stub, params={"max_tokens": 5})
    seen = await watch(stub, id_)
    assert seen.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED
