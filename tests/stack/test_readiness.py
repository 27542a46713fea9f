"""Health of a service for its container: `/healthz` reports that it lives, `/readyz` that it can do its work."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from urllib.parse import urlsplit

import aiohttp
import grpc
import pytest

from deploy.local.ports import free_port
from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job, until_output, watch
from tests.support.paths import ROOT
from tests.support.readiness import Answer, ask, get
from tests.support.stacks import FAST, stack_settings

SECONDS = 120
CALLS_TEMPORAL = ("gateway", "gpu-worker", "notifier")
SERVICES = (*CALLS_TEMPORAL, "codec", "http")


async def test_a_namespace_that_does_not_exist_is_named(stack: Stack) -> None:
    """The gateway is not ready, and neither its answer nor its log sends the operator elsewhere."""
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "TEMPORAL_NAMESPACE": "nope"})
    await gateway.start()
    answer = await ask_until(stack, gateway.name, lambda answer: not {"process", "grpc"} & set(answer.body["missing"]))
    await gateway.terminate()
    assert answer.status == 503
    assert answer.body["namespace"] == "nope"
    assert set(answer.body["missing"]) == {"namespace"}
    log = gateway.log
    assert "Temporal has no namespace nope" in log
    assert "an operator has to register" not in log


async def ask_until(stack: Stack, name: str, true: Callable[[Answer], bool]) -> Answer:
    """Return the first answer of /readyz for which `true` returns True."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                if true(answer := await ask(stack, name, "/readyz")):
                    return answer
            except aiohttp.ClientConnectionError:
                # The service does not listen yet.
                pass
            await asyncio.sleep(0.1)


def misses(name: str) -> Callable[[Answer], bool]:
    return lambda answer: name in answer.body["missing"]


def is_ready(answer: Answer) -> bool:
    return answer.status == 200


@pytest.fixture(scope="module")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Run a stack whose servers a test may kill."""
    async with Stack(stack_settings(tmp_path_factory.mktemp("readiness")), environment=FAST) as stack:
        yield stack


async def lives(stack: Stack, name: str) -> bool:
    return (await ask(stack, name, "/healthz")).status == 200


@pytest.mark.parametrize("name", SERVICES)
async def test_a_service_says_what_it_is(stack: Stack, name: str) -> None:
    """People can read its kind, its addresses, its peers and all versions."""
    ready, alive = await ask(stack, name, "/readyz"), await ask(stack, name, "/healthz")
    assert (ready.status, alive.status) == (200, 200)
    assert ready.body == {"ready": True, "missing": {}, "degraded": {}, **alive.body}
    assert alive.body["service"] == name
    versions = alive.body["versions"]
    assert versions["temporalio"] == metadata.version("temporalio")
    assert re.fullmatch(r"[\w.+-]+", versions["durable-llm-suite"])
    if name in CALLS_TEMPORAL:
        assert alive.body["namespace"] == "default"
        assert alive.body["temporal"] == stack.address("temporal")
        assert versions["grpcio"] == metadata.version("grpcio") or name != "gateway"
    if name in ("gateway", "codec", "http"):
        assert alive.body["address"] == stack.address(name)


async def head(url: str) -> bytes:
    """Return all bytes that a server sends after HEAD until it closes the connection."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"HEAD {parts.path} HTTP/1.0\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.0 200 ")
    return answer


async def test_a_path_that_does_not_exist_is_no_health(stack: Stack) -> None:
    """A probe with a misspelt path fails. Only /metrics serves metrics."""
    for path in ("/", "/ready", "/readyz/", "/healthz2"):
        assert (await ask(stack, "notifier", path)).status == 404
    assert (await ask(stack, "notifier", "/metrics")).status == 200
    url = stack.metrics_url("notifier").replace("/metrics", "/readyz")
    assert (await head(url)).partition(b"\r\n\r\n")[2] == b""
    assert (await get(url, "POST")).status == 405


@asynccontextmanager
async def silent_clients(url: str, number: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Hold connections open that send nothing, and yield their readers in the order of their beginning."""
    parts = urlsplit(url)
    clients = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(number)]
    try:
        yield [reader for reader, _ in clients]
    finally:
        for _, writer in clients:
            writer.close()


def threads_of(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/task"))


async def test_silent_clients_keep_no_probe_out(stack: Stack) -> None:
    """They hold a bounded number of threads. The oldest is closed for a newer one."""
    codec = stack.processes["codec"]
    before = threads_of(codec)
    async with silent_clients(stack.metrics_url("codec"), 300) as readers, asyncio.timeout(SECONDS):
        for _ in range(10):
            assert is_ready(await ask(stack, "codec", "/readyz"))
            assert threads_of(codec) < before + 100
        assert await readers[0].read() == b""


async def test_a_silent_client_is_closed(stack: Stack) -> None:
    async with silent_clients(stack.metrics_url("codec"), 1) as (reader,), asyncio.timeout(SECONDS):
        assert await reader.read() == b""


@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_a_service_listens_on_an_ipv6_address_in_either_form(fragile: Stack, host: str) -> None:
    gateway = fragile.add("gateway", {"GATEWAY_HOST": host, "GATEWAY_METRICS_HOST": host, "GATEWAY_ROLE": "api"})
    await on_ipv6(fragile, gateway)
    async with grpc.aio.insecure_channel(at_ipv6(fragile.address(gateway.name))) as channel:
        assert (await LlmServiceStub(channel).ListModels(llm_pb2.ListModelsRequest(), timeout=SECONDS)).models
    await gateway.terminate()


@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_the_codec_server_listens_on_an_ipv6_address_in_either_form(fragile: Stack, host: str) -> None:
    codec = fragile.add("codec", {"CODEC_HOST": host, "CODEC_METRICS_HOST": host, "CODEC_ALLOWED_HOSTS": host})
    await on_ipv6(fragile, codec)
    url = f"http://{at_ipv6(fragile.address(codec.name))}/decode"
    async with aiohttp.ClientSession() as session, session.post(url, json={"payloads": []}) as response:
        assert response.status == 200
    await codec.terminate()


async def on_ipv6(stack: Stack, process: Process) -> None:
    """Start a service whose addresses are of IPv6, and wait until it is ready."""
    await process.start()
    url = f"http://{at_ipv6(urlsplit(stack.metrics_url(process.name)).netloc)}/readyz"
    async with asyncio.timeout(SECONDS):
        while True:
            assert process.running, process.log
            try:
                if is_ready(answer := await get(url)):
                    break
            except aiohttp.ClientConnectionError:
                # The service does not listen yet.
                pass
            await asyncio.sleep(0.1)
    assert answer.body["address"] == at_ipv6(stack.address(process.name))


def at_ipv6(address: str) -> str:
    return f"[::1]:{address.rpartition(':')[2]}"


async def test_a_worker_is_ready_once_its_model_has_loaded(fragile: Stack) -> None:
    """It lives meanwhile."""
    worker = loading(fragile, 3600)
    await worker.start()
    answer = await ask_until(fragile, worker.name, lambda answer: list(answer.body["missing"]) == ["engine"])
    assert answer.status == 503
    assert not answer.body["ready"]
    assert await lives(fragile, worker.name)
    await worker.kill()

    worker = loading(fragile, 2)
    await worker.start()
    await worker.wait_ready()
    assert is_ready(await ask(fragile, worker.name, "/readyz"))
    await worker.kill()


def loading(stack: Stack, seconds: float) -> Process:
    """Return a worker whose model takes this time to load."""
    return stack.add("gpu-worker", {"GPU_WORKER_ENGINE_OPTIONS": json.dumps({"load_seconds": seconds})})


@pytest.mark.parametrize("kind", CALLS_TEMPORAL)
async def test_a_service_that_waits_for_temporal_is_not_ready(fragile: Stack, kind: str) -> None:
    """It is live and not ready from its start on."""
    process = fragile.add(kind, {"TEMPORAL_ADDRESS": f"127.0.0.1:{free_port()}"})
    await process.start()
    answer = await ask_until(fragile, process.name, misses("temporal"))
    assert answer.status == 503
    assert answer.body["missing"]["process"] == "is starting"
    assert await lives(fragile, process.name)
    await process.terminate()
    assert process.returncode == 0


async def test_a_service_that_loses_temporal_is_not_ready_until_it_is_back(fragile: Stack) -> None:
    await fragile.processes["temporal"].kill()
    for name in CALLS_TEMPORAL:
        answer = await ask_until(fragile, name, misses("temporal"))
        assert answer.status == 503
        assert await lives(fragile, name)
    assert is_ready(await ask(fragile, "codec", "/readyz")), "the codec server does not need Temporal"
    await fragile.processes["temporal"].start()
    await fragile.processes["temporal"].wait_ready()
    for name in CALLS_TEMPORAL:
        await ask_until(fragile, name, is_ready)


async def test_a_service_without_its_feed_is_ready(fragile: Stack) -> None:
    """Jobs run and end without the feed. All gateways lose it together, and none ready would mean no service."""
    await fragile.processes["nats"].kill()
    for name in ("gateway", "gpu-worker"):
        answer = await ask_until(fragile, name, lambda answer: "feed" in answer.body["degraded"])
        assert answer.status == 200
    await fragile.processes["nats"].start()
    await fragile.processes["nats"].wait_ready()
    for name in ("gateway", "gpu-worker"):
        await ask_until(fragile, name, lambda answer: not answer.body["degraded"])


async def test_a_service_that_shuts_down_is_not_ready(fragile: Stack) -> None:
    """It is not ready until its end, which comes after its jobs' end."""
    patient = {
        "GPU_WORKER_MODEL": "idle",
        "GPU_WORKER_TASK_QUEUE": "llm-gpu-activities.idle",
        "GPU_WORKER_SHUTDOWN_GRACE": "PT600S",
    }
    worker = fragile.add("gpu-worker", {**patient, "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 5}'})
    await worker.start()
    await worker.wait_ready()
    async with grpc.aio.insecure_channel(fragile.address("gateway")) as channel:
        client = LlmServiceStub(channel)
        job = new_job(model="idle", params={"max_tokens": 8000})
        id_ = (await client.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
        await until_output(client, id_)
        worker.signal(signal.SIGTERM)
        answer = await ask_until(fragile, worker.name, misses("process"))
        assert (answer.status, answer.body["missing"]) == (503, {"process": "is shutting down"})
        assert await lives(fragile, worker.name)
        await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
        assert (await watch(client, id_)).states[-1] == "CANCELLED"
    assert await worker.wait() == 0


async def test_a_gateway_that_only_runs_workflows_gets_ready(fragile: Stack) -> None:
    """It listens only on the port of its metrics."""
    gateway = fragile.add("gateway", {"GATEWAY_ROLE": "workflows"})
    await gateway.start()
    await gateway.wait_ready()
    assert "address" not in (await ask(fragile, gateway.name, "/readyz")).body
    await gateway.terminate()


HUNG = """
import asyncio, time
from runtime import process
from runtime.health import Readiness
from runtime.metrics import serving_metrics
from runtime.metrics_settings import MetricsSettings

async def main():
    readiness = Readiness("hung")
    async with serving_metrics(MetricsSettings(metrics_port=0), readiness):
        with readiness.serving():
            time.sleep(3600)

process.run("hung", main)
"""


async def test_a_process_whose_event_loop_stands_still_is_not_ready() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HUNG), stderr=asyncio.subprocess.PIPE, cwd=ROOT, env=os.environ
    )
    try:
        assert process.stderr is not None
        line = json.loads(await process.stderr.readline())
        url = line["message"].removeprefix("metrics on ")
        assert (await get(url.replace("/metrics", "/healthz"))).status == 200
        answer = await get(url.replace("/metrics", "/readyz"))
        assert answer.status == 503
        assert answer.body["missing"] == {"process": "has not answered within 3 s"}
    finally:
        process.kill()
        await process.wait()
