"""ListWorkers: what GPU workers report about themselves, through a real stack whose workers come and go."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from html import unescape
from typing import Any

import grpc
import nats
import pytest

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.http_fronts import running_front
from tests.support.jobs import details_of, new_job, until_output, watch
from tests.support.scrapes import scrape
from tests.support.stacks import FAST, stack_settings

PATIENCE = 120
WORKER = {
    "GPU_WORKER_REPORT_INTERVAL": "PT2S",
    "GPU_WORKER_MAX_CONCURRENT": "4",
    "GPU_WORKER_SHUTDOWN_GRACE": "PT2M",
}
QUEUES = ["llm-gpu-activities", "llm-gpu-activities.background"]
REPORTS = "llm.feed.workers.reports"


@pytest.fixture(scope="module")
async def installation(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    only = ("temporal", "nats", "gateway", "notifier")
    async with Stack(stack_settings(tmp_path_factory.mktemp("workers")), only=only, environment=FAST) as stack:
        yield stack


@pytest.fixture(scope="module")
async def client(installation: Stack) -> AsyncIterator[LlmServiceStub]:
    async with grpc.aio.insecure_channel(installation.address("gateway")) as channel:
        yield LlmServiceStub(channel)


async def started(stack: Stack, **environment: str) -> tuple[Process, str]:
    """Start a worker; return it and its name."""
    worker = stack.add("gpu-worker", {**WORKER, **environment})
    await worker.start()
    await worker.wait_ready()
    (name,) = [info.worker for info in await until(stack, lambda infos: named(infos, worker.pid))]
    return worker, name


def named(infos: list[llm_pb2.WorkerInfo], pid: int) -> list[llm_pb2.WorkerInfo]:
    return [info for info in infos if info.worker.endswith(f"-{pid}")]


async def until(stack: Stack, condition: Callable[[list[llm_pb2.WorkerInfo]], Any], gateway: str = "gateway") -> Any:
    """Return what the condition makes of the list of workers as soon as that is true and the gateway is connected."""
    async with asyncio.timeout(PATIENCE), grpc.aio.insecure_channel(stack.address(gateway)) as channel:
        while True:
            try:
                if found := condition(await workers_of(LlmServiceStub(channel))):
                    return found
            except grpc.aio.AioRpcError as error:
                if details_of(error)["ErrorInfo"].reason != "FEED_UNAVAILABLE":
                    raise
            await asyncio.sleep(0.2)


async def workers_of(stub: LlmServiceStub, **filters: str) -> list[llm_pb2.WorkerInfo]:
    response = await stub.ListWorkers(llm_pb2.ListWorkersRequest(**filters), timeout=PATIENCE)
    return [*response.workers]


async def test_workers_come_and_go(installation: Stack, client: LlmServiceStub) -> None:
    """The list shows how full each is. One that is killed vanishes, the other stays. A new gateway lists it, too."""
    (one, _), (other, staying) = [await started(installation) for _ in range(2)]
    idle = {info.worker: info for info in await workers_of(client)}
    for info in idle.values():
        assert (info.model, info.engine, info.gpu.name) == ("docstrings", "simulated", "simulated")
        assert (info.seats, info.seats_in_use, [*info.task_queues]) == (4, 0, QUEUES)
        assert info.version
        assert info.start_time.ToNanoseconds() <= info.report_time.ToNanoseconds()

    ids = []
    for _ in range(8):
        job = new_job(params={"max_tokens": 8000})
        ids.append((await client.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id)
    full = await until(installation, lambda infos: sum(i.seats_in_use for i in infos) == 8 and rates(infos))
    for info in full:
        assert info.state == llm_pb2.WORKER_STATE_SERVING
        assert info.running_sequences + info.waiting_sequences <= info.seats_in_use == 4
        assert 0 < info.kv_cache_usage <= 1

    one.signal(signal.SIGKILL)
    await until(installation, lambda infos: [info.worker for info in infos] == [staying])
    gateway = installation.add("gateway")
    await gateway.start()
    await gateway.wait_ready()
    await until(installation, lambda infos: [info.worker for info in infos] == [staying], gateway.name)
    await gateway.terminate()

    for id_ in ids:
        await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await until(installation, lambda infos: infos and not sum(info.seats_in_use for info in infos))
    await other.terminate()
    await until(installation, lambda infos: not infos)


def rates(infos: list[llm_pb2.WorkerInfo]) -> list[llm_pb2.WorkerInfo]:
    """Return the workers if all of them generate."""
    return infos if all(info.tokens_per_second > 0 and info.running_sequences for info in infos) else []


async def test_a_worker_that_stops_drains_and_then_is_gone(installation: Stack, client: LlmServiceStub) -> None:
    """At once, although its reports are a minute apart."""
    worker, name = await started(installation, GPU_WORKER_REPORT_INTERVAL="PT1M")
    job = new_job(params={"max_tokens": 8000})
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    await until_output(client, id_)
    worker.signal(signal.SIGTERM)
    (draining,) = await until(
        installation, lambda infos: [i for i in infos if i.state == llm_pb2.WORKER_STATE_DRAINING]
    )
    assert (draining.worker, draining.seats_in_use) == (name, 1)
    await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    assert (await watch(client, id_)).states[-1] == "CANCELLED"
    assert await worker.wait() == 0
    await until(installation, lambda infos: not infos)


async def test_a_worker_that_loads_says_so(installation: Stack, client: LlmServiceStub) -> None:
    options = '{"load_seconds": 3600}'
    worker = installation.add("gpu-worker", {**WORKER, "GPU_WORKER_ENGINE_OPTIONS": options})
    await worker.start()
    (info,) = await until(installation, lambda infos: infos)
    assert info.state == llm_pb2.WORKER_STATE_LOADING
    assert not info.HasField("gpu")
    assert not info.HasField("kv_cache_usage")
    await worker.terminate()
    await until(installation, lambda infos: not infos)


async def refusal(client: LlmServiceStub) -> grpc.aio.AioRpcError:
    """Return the error with which ListWorkers is refused, as soon as it is."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await workers_of(client)
            except grpc.aio.AioRpcError as error:
                return error
            await asyncio.sleep(0.2)


async def test_without_nats_nobody_says_that_there_are_no_workers(installation: Stack, client: LlmServiceStub) -> None:
    """The list is there again with the broker."""
    worker, name = await started(installation)
    broker = installation.processes["nats"]
    await broker.kill()
    refused = await refusal(client)
    assert refused.code() == grpc.StatusCode.UNAVAILABLE
    details = details_of(refused)
    assert details["ErrorInfo"].reason == "FEED_UNAVAILABLE"
    assert details["RetryInfo"].retry_delay.ToNanoseconds() > 0
    async with running_front(installation) as front:
        page = (await front.client.get("/console/models")).text
        assert "The workers cannot be shown now" in page
        assert refused.details() in unescape(page)
    await broker.start()
    await broker.wait_ready()
    await until(installation, lambda infos: [info.worker for info in infos] == [name])
    await worker.terminate()


async def test_garbage_on_the_subject_is_ignored_and_counted(installation: Stack, client: LlmServiceStub) -> None:
    worker, name = await started(installation)
    sender = await nats.connect(f"nats://{installation.address('nats')}")
    for data in (b"", b"\xff" * 100, b"x" * 100_000, b"\x0a\x03\x0a\x01\x1b"):
        await sender.publish(REPORTS, data)
    await sender.close()
    ignored = "llm_gateway_worker_reports_ignored_total"
    async with asyncio.timeout(PATIENCE):
        while (await scrape(installation, "gateway")).total(ignored) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert [info.worker for info in await workers_of(client, model="docstrings")] == [name]
    assert await workers_of(client, model="other") == []
    await worker.terminate()
