"""Temporal with an API key, as Temporal Cloud asks for. A proxy in front of the development server asks for it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.certificates import Authority
from tests.support.jobs import new_job, run_job
from tests.support.temporal_proxy import TemporalProxy, temporal_proxy

KEY = "temporal-cloud-key"


class Cloud(NamedTuple):
    proxy: TemporalProxy
    environment: dict[str, str]


@pytest.fixture
async def cloud(stack: Stack, tmp_path: Path) -> AsyncIterator[Cloud]:
    ca = Authority(tmp_path)
    pair = ca.issue("cloud")
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.cert.read_bytes())])
    async with temporal_proxy(stack.address("temporal"), credentials) as (proxy, address):
        proxy.api_key = KEY
        yield Cloud(proxy, {"TEMPORAL_ADDRESS": address, "TEMPORAL_TLS_SERVER_CA_CERT_PATH": str(ca.path)})


async def test_a_gateway_and_a_worker_work_with_an_api_key(stack: Stack, cloud: Cloud) -> None:
    queue = "behind-an-api-key"
    environment = {
        **cloud.environment,
        "TEMPORAL_API_KEY": KEY,
        "GATEWAY_WORKFLOW_QUEUE": f"{queue}-workflows",
        "GATEWAY_MODELS": (
            '[{"name": "docstrings", "context_tokens": 8192, "max_output_tokens": 8192,'
            f' "default_max_tokens": 64, "queue": "{queue}"}}]'
        ),
        "GPU_WORKER_TASK_QUEUE": queue,
    }
    processes = [stack.add(kind, environment) for kind in ("gateway", "gpu-worker")]
    for process in processes:
        await process.start()
    for process in processes:
        await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(processes[0].name)) as channel:
        seen = await run_job(LlmServiceStub(channel), new_job(params={"max_tokens": 5}))
    assert (seen.states[-1], seen.final.result.metadata.attempts) == ("SUCCEEDED", 1)
    assert cloud.proxy.called["PollActivityTaskQueue"]
    for process in reversed(processes):
        await process.terminate()


async def test_a_process_with_a_wrong_api_key_says_so_and_waits(stack: Stack, cloud: Cloud) -> None:
    """An operator may give Temporal the key later. The key is not in the log."""
    gateway = stack.add("gateway", {**cloud.environment, "GATEWAY_ROLE": "api", "TEMPORAL_API_KEY": "another-key"})
    await gateway.start()
    async with asyncio.timeout(120):
        while "the API key is wrong" not in gateway.log:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.1)
    assert "another-key" not in gateway.log
    cloud.proxy.api_key = "another-key"
    await gateway.wait_ready()
    await gateway.terminate()
