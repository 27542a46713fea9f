"""Clients that do not read their answers cost a gateway little memory, and do not affect other clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs import names
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.attacks import (
    DATA,
    GOAWAY,
    PREFACE,
    SETTINGS,
    call_frames,
    flood,
    frame,
    read_frame,
    stalled_clients,
)
from tests.support.jobs import details_of, new_job, run_job, watch
from tests.support.memory import peak_bytes, resident_bytes
from tests.support.scrapes import scrape, scrape_until

GET_STATUS = "/llm.v1.LlmService/GetStatus"
STREAM_STATUS = "/llm.v1.LlmService/StreamStatus"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SIZES = {"small": 1000, "large": 620_000, "largest": 2_000_000}
MB = 1_000_000


@activity.defn(name=names.ACTIVITY_RUN)
async def large_answer(request: internal_pb2.RunRequest) -> llm_pb2.JobResult:
    """Return immediately as many bytes as the number in the prompt, and as many logprobs as max_tokens."""
    logprob = llm_pb2.TokenLogprobs(chosen=llm_pb2.TokenLogprob(token="x", logprob=-1.0))
    return llm_pb2.JobResult(
        output="x" * int(request.job.prompt),
        finish_reason=llm_pb2.FINISH_REASON_STOP,
        metadata=llm_pb2.ResultMetadata(output_tokens=1),
        logprobs=[logprob] * request.job.params.max_tokens,
    )


class Target(NamedTuple):
    """A gateway of one test, and the ids of ended jobs by the names in SIZES."""

    gateway: Process
    stack: Stack
    stub: LlmServiceStub
    ids: dict[str, str]

    @property
    def address(self) -> str:
        return self.stack.address(self.gateway.name)

    async def metric(self, name: str) -> float:
        """Return the sum of a metric's samples that the gateway serves."""
        return (await scrape(self.stack, self.gateway.name)).total(name)


@pytest.fixture(scope="module")
async def ids(stack: Stack, stub: LlmServiceStub, temporal: Client) -> dict[str, str]:
    """Run jobs with large results to their end, and return their ids by the names in SIZES."""
    client = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    found = {}
    # No other worker polls the queue of the model "idle".
    async with Worker(client, task_queue="llm-gpu-activities.idle", activities=[large_answer]):
        for name, size in SIZES.items():
            seen = await run_job(stub, new_job(str(size), model="idle", params={"max_tokens": 10}))
            found[name] = seen.final.status.workflow_id
    return found


@asynccontextmanager
async def target(stack: Stack, ids: dict[str, str], **settings: str) -> AsyncIterator[Target]:
    """Run a gateway with these settings, warm it up, and stop it at the end."""
    gateway = stack.add("gateway", {f"GATEWAY_{name.upper()}": value for name, value in settings.items()})
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        stub = LlmServiceStub(channel)
        for id_ in ids.values():
            await get(stub, id_)
            await watch(stub, id_)
        yield Target(gateway, stack, stub, ids)
    await gateway.terminate()
    assert gateway.returncode == 0


async def get(stub: LlmServiceStub, id_: str) -> llm_pb2.GetStatusResponse:
    return await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=60)


def request_of(method: str, id_: str) -> Message:
    kind = llm_pb2.GetStatusRequest if method == GET_STATUS else llm_pb2.StreamStatusRequest
    return kind(workflow_id=id_)


async def others_are_served(attacked: Target) -> None:
    """Check that another client gets a small job immediately, and a large result and its stream, if only by retries."""
    seen = await run_job(attacked.stub, new_job(params={"max_tokens": 5}))
    assert seen.final.result.output.encode() == seen.output
    largest = attacked.ids["largest"]
    while await is_refused(attacked.stub, largest):  # noqa: ASYNC110  nothing notifies
        await asyncio.sleep(1)
    assert len((await watch(attacked.stub, largest)).output) == SIZES["largest"]


@pytest.mark.parametrize(
    ("method", "connections"),
    [
        (GET_STATUS, 1),
        (STREAM_STATUS, 100),
        pytest.param(GET_STATUS, 100, marks=pytest.mark.long),
        pytest.param(STREAM_STATUS, 1, marks=pytest.mark.long),
    ],
)
async def test_a_gateway_survives_a_thousand_unread_answers(
    stack: Stack, ids: dict[str, str], method: str, connections: int
) -> None:
    """The answers have 620 kB each, and the clients' windows are closed. It stays below 512 MB and serves others."""
    async with (
        target(stack, ids) as attacked,
        stalled_clients(attacked.address, connections) as clients,
        asyncio.timeout(100),
    ):
        attack = asyncio.create_task(flood(clients, method, request_of(method, ids["large"]), 1000))
        await others_are_served(attacked)
        await attack
        await others_are_served(attacked)
        assert peak_bytes(attacked.gateway) < 512 * MB


@pytest.mark.parametrize("window", [0, pytest.param(1_000_000, marks=pytest.mark.long)])
async def test_streams_that_stop_reading_cost_little(stack: Stack, ids: dict[str, str], window: int) -> None:
    """300 streams of 2 MB with a connection each, stopped at the start or in the middle, cost less than 50 MB."""
    async with target(stack, ids) as attacked:
        before = resident_bytes(attacked.gateway)
        async with stalled_clients(attacked.address, 300, window) as clients, asyncio.timeout(100):
            await flood(clients, STREAM_STATUS, request_of(STREAM_STATUS, ids["largest"]), 300)
            await others_are_served(attacked)
            assert not any(client.ended for client in clients)
            assert resident_bytes(attacked.gateway) - before < 50 * MB


async def test_a_large_prompt_takes_no_room_of_answers(
    stack: Stack, stub: LlmServiceStub, temporal: Client, ids: dict[str, str]
) -> None:
    """With little room left, GetStatus still answers for such a job, before and after its small result exists."""
    prompt = "5".rjust(1_900_000)
    waiting = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(prompt, model="idle")), timeout=60)
    # One unread large answer leaves no room for another.
    async with (
        target(stack, ids, unread_bytes=str(8 * MB)) as attacked,
        stalled_clients(attacked.address, 1) as clients,
    ):
        await flood(clients, GET_STATUS, request_of(GET_STATUS, ids["largest"]), 1)
        await scrape_until(stack, lambda found: found.total("llm_gateway_unread_bytes") > 3 * MB, attacked.gateway.name)
        assert await is_refused(attacked.stub, ids["largest"])
        assert (await get(attacked.stub, waiting.workflow_id)).status.state == llm_pb2.JOB_STATE_QUEUED
        async with Worker(temporal, task_queue="llm-gpu-activities.idle", activities=[large_answer]):
            await watch(stub, waiting.workflow_id)
        assert (await get(attacked.stub, waiting.workflow_id)).result.output == "xxxxx"


async def test_a_large_result_leaves_its_output_out_of_the_last_message(stack: Stack, ids: dict[str, str]) -> None:
    """The deltas contain the output. GetStatus returns it with the logprobs. A small result is whole."""
    async with target(stack, ids) as quiet:
        for name, size in SIZES.items():
            seen = await watch(quiet.stub, ids[name])
            whole = (await get(quiet.stub, ids[name])).result
            assert len(whole.logprobs) == 10
            assert seen.output.decode() == whole.output == "x" * size
            last = seen.final
            assert last.output_omitted == (size > 256 * 1024)
            if last.output_omitted:
                whole.ClearField("output")
                whole.ClearField("logprobs")
            assert last.result == whole


async def test_the_connection_of_a_client_that_stopped_reading_is_closed(stack: Stack, ids: dict[str, str]) -> None:
    """It closes after GATEWAY_STALL_TIMEOUT and its memory is freed. One that reads or waits for news stays open."""
    async with target(stack, ids, stall_timeout="PT3S", keepalive="PT30S") as attacked:
        running = new_job(params={"max_tokens": 4000})
        open_id = (await attacked.stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
        quiet = attacked.stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=open_id), timeout=60)
        await quiet.read()
        busy_id = (await attacked.stub.Submit(llm_pb2.SubmitRequest(job=running))).workflow_id
        busy = asyncio.create_task(watch(attacked.stub, busy_id))
        async with asyncio.timeout(90), stalled_clients(attacked.address, 2) as clients:
            # The connections may be closed before the flood has ended.
            held = asyncio.create_task(
                scrape_until(stack, lambda found: found.total("llm_gateway_unread_bytes") > MB, attacked.gateway.name)
            )
            await flood(clients[:1], STREAM_STATUS, request_of(STREAM_STATUS, ids["largest"]), 20)
            await flood(clients[1:], GET_STATUS, request_of(GET_STATUS, ids["large"]), 20)
            await held
            await asyncio.gather(*(client.closed.wait() for client in clients))
            await scrape_until(
                stack,
                lambda found: (
                    found.total("llm_gateway_watchers") == 2 and found.total("llm_gateway_unread_bytes") < 100_000
                ),
                attacked.gateway.name,
            )
            for id_ in (busy_id, open_id):
                await attacked.stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
            assert (await busy).states[-1] == "CANCELLED"
            states = set()
            while (message := await quiet.read()) is not grpc.aio.EOF:
                states.add(message.status.state)
            assert llm_pb2.JOB_STATE_CANCELLED in states
        assert "closed 2 connections" in attacked.gateway.log or "closed 1 connections" in attacked.gateway.log


async def test_a_slow_reader_is_no_stalled_one(stack: Stack, ids: dict[str, str]) -> None:
    """A client that reads an answer for 12 s gets it whole, although others wait for the room that it holds."""
    async with (
        target(stack, ids, unread_bytes="12000000") as attacked,
        stalled_clients(attacked.address, 4) as (slow, *others),
        asyncio.timeout(100),
    ):
        slow.call(GET_STATUS, request_of(GET_STATUS, ids["largest"]))
        await slow.all_answered()
        attack = asyncio.create_task(flood(others, GET_STATUS, request_of(GET_STATUS, ids["large"]), 1000))
        size = SIZES["largest"]
        for taken in range(0, size, size // 24):
            slow.take(size // 24)
            await slow.until_received(min(taken + size // 24, size))
            await asyncio.sleep(0.5)
        assert slow.received[1] >= size
        assert not slow.closed.is_set()
        attack.cancel()


@pytest.mark.parametrize("method", [GET_STATUS, STREAM_STATUS])
async def test_reading_small_answers_keeps_no_large_ones(stack: Stack, ids: dict[str, str], method: str) -> None:
    """The connection of a client that reads all answers but one is closed, too."""
    async with (
        target(stack, ids, stall_timeout="PT3S") as attacked,
        stalled_clients(attacked.address, window=10_000) as (client,),
        asyncio.timeout(60),
    ):
        client.call(method, request_of(method, ids["large"]))
        await client.all_answered()
        while not client.closed.is_set():
            client.call(GET_STATUS, request_of(GET_STATUS, ids["small"]))
            await client.until_ended(client.calls - 1)
            await asyncio.sleep(0.1)
        assert len(client.ended) >= 2


async def test_answers_that_share_a_slow_connection_have_time(stack: Stack, ids: dict[str, str]) -> None:
    """Ten large answers may take longer than GATEWAY_STALL_TIMEOUT concurrently, next to small ones."""
    calls, size, seconds = 10, SIZES["large"], 8
    async with (
        target(stack, ids, stall_timeout="PT5S") as busy,
        stalled_clients(busy.address, window=10_000) as (slow,),
        asyncio.timeout(100),
    ):
        slow.call(GET_STATUS, request_of(GET_STATUS, ids["large"]), calls)
        await slow.all_answered()
        began = asyncio.get_running_loop().time()
        for step in range(1, 21):
            # None of the ten is complete before the last step.
            await asyncio.sleep(began + step / 20 * seconds - asyncio.get_running_loop().time())
            for call in range(calls):
                slow.take(size // 20, call)
            slow.call(GET_STATUS, request_of(GET_STATUS, ids["small"]))
            await slow.until_ended(step)
        await slow.all_ended()
        assert not slow.closed.is_set()
        assert len(slow.ended) == calls + 20


async def test_calls_are_limited(stack: Stack, ids: dict[str, str]) -> None:
    """Calls over GATEWAY_MAX_CALLS, unread answers included, get RESOURCE_EXHAUSTED with RetryInfo. Health answers."""
    async with target(stack, ids, max_calls="5") as attacked:
        async with stalled_clients(attacked.address) as (client,), asyncio.timeout(60):
            client.call(GET_STATUS, request_of(GET_STATUS, ids["small"]), 5)
            await client.all_answered()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await get(attacked.stub, ids["small"])
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            details = details_of(error.value)
            assert details["ErrorInfo"].reason == "LIMIT_REACHED"
            assert details["RetryInfo"].retry_delay.seconds > 0
            async with grpc.aio.insecure_channel(attacked.address) as channel:
                health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(30):
            while await is_refused(attacked.stub, ids["small"]):
                pass


async def test_clients_that_do_not_read_do_not_keep_all_calls(stack: Stack, ids: dict[str, str]) -> None:
    """When the gateway is at GATEWAY_MAX_CALLS, it ends their calls long before GATEWAY_STALL_TIMEOUT."""
    async with (
        target(stack, ids, max_calls="5", stall_timeout="PT1H") as attacked,
        stalled_clients(attacked.address) as (client,),
        asyncio.timeout(100),
    ):
        client.call(GET_STATUS, request_of(GET_STATUS, ids["small"]), 5)
        await client.all_answered()
        while await is_refused(attacked.stub, ids["small"]):  # noqa: ASYNC110  nothing notifies
            await asyncio.sleep(1)
        assert client.closed.is_set()


async def is_refused(stub: LlmServiceStub, id_: str) -> bool:
    """Return True if GetStatus is refused because of a limit, False if it returns the job's result."""
    try:
        assert (await get(stub, id_)).result.output
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return True
    return False


async def test_a_connection_is_told_how_many_calls_it_may_have(stack: Stack, ids: dict[str, str]) -> None:
    """The server sends GATEWAY_MAX_CALLS_PER_CONNECTION as HTTP/2's SETTINGS_MAX_CONCURRENT_STREAMS."""
    async with target(stack, {}, max_calls_per_connection="7") as quiet, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(*quiet.address.rsplit(":", 1))
        writer.write(PREFACE + frame(SETTINGS))
        kind, _, _, payload = await read_frame(reader)
        settings = {payload[at : at + 2]: payload[at + 2 : at + 6] for at in range(0, len(payload), 6)}
        assert kind == SETTINGS
        assert settings[b"\x00\x03"] == (7).to_bytes(4, "big")
        writer.close()


async def test_an_idle_connection_is_closed(stack: Stack) -> None:
    """The server sends GOAWAY after GATEWAY_CONNECTION_IDLE. A client then reconnects at its next call."""
    async with target(stack, {}, connection_idle="PT1S") as quiet, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(*quiet.address.rsplit(":", 1))
        writer.write(PREFACE + frame(SETTINGS))
        while (await read_frame(reader))[0] != GOAWAY:
            pass
        writer.close()


async def test_a_stream_outlives_the_age_of_its_connection(stack: Stack) -> None:
    """After GATEWAY_CONNECTION_AGE a GOAWAY makes clients open a new connection. The open stream continues."""
    async with target(stack, {}, connection_age="PT1S") as quiet, asyncio.timeout(60):
        job = new_job(params={"max_tokens": 1000})
        id_ = (await quiet.stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
        reader, writer = await asyncio.open_connection(*quiet.address.rsplit(":", 1))
        writer.write(PREFACE + frame(SETTINGS))
        writer.write(call_frames(1, STREAM_STATUS, llm_pb2.StreamStatusRequest(workflow_id=id_).SerializeToString()))
        later = 0
        gone = False
        while later < 10:
            kind, _, stream, _ = await read_frame(reader)
            gone = gone or kind == GOAWAY
            later += gone and (kind, stream) == (DATA, 1)
        writer.close()
        seen = await watch(quiet.stub, id_)
        assert seen.states[-1] == "SUCCEEDED"
        assert seen.output == seen.final.result.output.encode()


async def test_reflection_is_limited(stack: Stack) -> None:
    """An unread answer may hold the whole contract, so 32 calls are answered concurrently and the others refused."""
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="llm.v1.LlmService")
    async with target(stack, {}) as attacked, stalled_clients(attacked.address) as (client,), asyncio.timeout(30):
        before = resident_bytes(attacked.gateway)
        client.call(REFLECTION, request, 1000)
        await client.all_answered()
        assert len(client.ended) == 1000 - 32
        assert resident_bytes(attacked.gateway) - before < 50 * MB
