"""What the Python client takes for a break that passes, and when it gives up."""

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta

import grpc
import pytest

from deploy.local.stack import Stack
from durable_llm import ApiError, AsyncClient, Output, RetryPolicy, errors
from llm_pb import llm_pb2
from tests.support.jobs import new_job
from tests.support.unsteady_gateway import Turn, serving

NEVER = timedelta(days=1)
SECONDS = 60


@pytest.fixture(scope="module")
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(stack.address("gateway")) as client:
        yield client


def waits_in(caplog: pytest.LogCaptureFixture) -> list[float]:
    """Return how long the client has waited before each further try, in seconds."""
    messages = [record.getMessage() for record in caplog.records if record.name == "durable_llm"]
    return [float(message.split()[-2]) for message in messages]


async def test_a_result_is_whole_after_one_that_was_given_up(stack: Stack, client: AsyncClient) -> None:
    """The stream's last message comes without the output. The first wait ends before the call that returns it."""
    job = await client.submit(new_job(params={"max_tokens": 1000, "logprobs": 20}))
    result = await job.result()
    assert result.ByteSize() > 256 * 1024
    async with serving(stack, Turn(fails=False)) as gateway, AsyncClient(gateway.address) as other:
        again = other.job(job.workflow_id)
        gateway.answers.clear()
        waiting = asyncio.create_task(again.result())
        async with asyncio.timeout(SECONDS):
            await gateway.asked.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        gateway.answers.set()
        assert await again.result() == result


async def test_a_message_that_is_too_large_is_not_sent_again(stack: Stack) -> None:
    """gRPC refuses it with RESOURCE_EXHAUSTED, as a gateway refuses what it may accept later."""
    policy = RetryPolicy(connect_timeout=NEVER, give_up_after=NEVER)
    async with AsyncClient(stack.address("gateway"), retry=policy) as client:
        with pytest.raises(ApiError) as refused:
            async with asyncio.timeout(SECONDS):
                await client.submit(new_job("x" * 5_000_000))
    assert refused.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ApiError("", grpc.StatusCode.RESOURCE_EXHAUSTED), False),
        (ApiError("", grpc.StatusCode.RESOURCE_EXHAUSTED, retry_delay=timedelta(0)), True),
        (errors.LimitReached("", grpc.StatusCode.RESOURCE_EXHAUSTED), True),
        (errors.Unavailable("", grpc.StatusCode.UNAVAILABLE), True),
        (ApiError("", grpc.StatusCode.INVALID_ARGUMENT), False),
    ],
    ids=["a message's size", "RetryInfo", "a limit", "unavailable", "invalid"],
)
def test_only_what_passes_is_repeated(error: ApiError, again: bool) -> None:
    wait = RetryPolicy().backoff(error, 1, timedelta(0), answered=True)
    assert (wait is not None) == again


async def test_a_pause_of_the_reader_is_not_the_services_silence(stack: Stack, client: AsyncClient) -> None:
    """Each stream breaks after the status that it repeats, during a pause that is longer than the client tries."""
    job = await client.submit(new_job(model="idle"))
    policy = RetryPolicy(connect_timeout=timedelta(seconds=4), give_up_after=timedelta(seconds=4))
    async with serving(stack, Turn(messages=1)) as gateway, AsyncClient(gateway.address, retry=policy) as other:
        messages = other.job(job.workflow_id).watch()
        for _ in range(3):
            assert (await anext(messages)).status.state == llm_pb2.JOB_STATE_QUEUED
            await asyncio.sleep(5)
        await messages.aclose()
    await job.cancel()


async def test_a_stream_that_always_breaks_after_its_first_message_is_given_up(
    stack: Stack, client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The status that each stream repeats is no progress. The waits between the tries grow."""
    job = await client.submit(new_job(model="idle"))
    policy = RetryPolicy(connect_timeout=timedelta(seconds=3), give_up_after=timedelta(seconds=3))
    with caplog.at_level(logging.INFO, "durable_llm"):
        async with serving(stack, Turn(messages=1)) as gateway, AsyncClient(gateway.address, retry=policy) as other:
            with pytest.raises(errors.Unavailable, match="the connection broke"):
                async with asyncio.timeout(SECONDS):
                    await other.job(job.workflow_id).result()
    assert gateway.streams > 1
    waits = waits_in(caplog)
    assert len(waits) == gateway.streams - 1
    assert max(waits) > policy.initial_backoff.total_seconds() * 1.5
    await job.cancel()


async def test_something_new_makes_the_waits_short_again(
    stack: Stack, client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Each stream breaks after its second message."""
    job = await client.submit(new_job(params={"max_tokens": 300}))
    policy = RetryPolicy()
    output = Output()
    with caplog.at_level(logging.INFO, "durable_llm"):
        async with serving(stack, Turn(messages=2)) as gateway, AsyncClient(gateway.address, retry=policy) as other:
            async for piece in other.job(job.workflow_id).stream():
                output.add(piece)
    waits = waits_in(caplog)
    assert len(waits) >= 3
    assert max(waits) <= policy.initial_backoff.total_seconds() * 1.5
    assert output.text == (await job.result()).output


async def test_a_silent_stream_is_opened_again(stack: Stack, client: AsyncClient) -> None:
    """A gateway sends a message at least every GATEWAY_KEEPALIVE, also of a job of which nothing is new."""
    job = await client.submit(new_job(params={"max_tokens": 20}))
    result = await job.result()
    silent = Turn(messages=0, silent=True), Turn(messages=1, silent=True), Turn(fails=False)
    async with (
        serving(stack, *silent) as gateway,
        AsyncClient(gateway.address, idle_timeout=timedelta(seconds=3)) as other,
        asyncio.timeout(2 * SECONDS),
    ):
        assert await other.job(job.workflow_id).result() == result
    assert gateway.streams >= 3


async def test_a_stream_that_a_proxy_resets_is_opened_again(stack: Stack, client: AsyncClient) -> None:
    """As Envoy does when its gateway dies."""
    job = await client.submit(new_job(params={"max_tokens": 20}))
    resets = Turn(messages=0, reset=True), Turn(messages=1, reset=True), Turn(fails=False)
    async with serving(stack, *resets) as gateway, AsyncClient(gateway.address) as other:
        text = "".join([piece.text async for piece in other.job(job.workflow_id).stream()])
    assert text == (await job.result()).output != ""
    assert gateway.streams == len(resets)


async def test_a_service_that_stays_silent_is_given_up(stack: Stack, client: AsyncClient) -> None:
    job = await client.submit(new_job(model="idle"))
    policy = RetryPolicy(give_up_after=timedelta(seconds=2))
    async with (
        serving(stack, Turn(messages=1, silent=True)) as gateway,
        AsyncClient(gateway.address, retry=policy, idle_timeout=timedelta(seconds=1)) as other,
    ):
        with pytest.raises(errors.Unavailable, match="no message"):
            async with asyncio.timeout(SECONDS):
                await other.job(job.workflow_id).result()
    await job.cancel()


async def test_keepalives_are_no_silence(stack: Stack, client: AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """A job of which nothing is new is watched on one stream: the stack's gateway sends one every second."""
    job = await client.submit(new_job(model="idle"))
    async with AsyncClient(stack.address("gateway"), idle_timeout=timedelta(seconds=10)) as other:
        with caplog.at_level(logging.INFO, "durable_llm"), pytest.raises(TimeoutError):
            await other.job(job.workflow_id).result(timedelta(seconds=15))
    assert not waits_in(caplog)
    await job.cancel()
