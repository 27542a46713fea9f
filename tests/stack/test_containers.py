"""What runs in containers besides the services: their health check, and the job that prepares Temporal."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client

from deploy.compose.secrets import create_secrets
from deploy.local.ports import free_port
from deploy.local.probes import listens
from deploy.local.process import Process
from deploy.local.stack import Stack
from feed.feed import FeedSettings
from jobs import names
from runtime.nats_client import connect_options, new_client
from tests.support import compose
from tests.support.certificates import Authority
from tests.support.commands import run
from tests.support.paths import ROOT

SECONDS = 120
NAMESPACE = "of-a-container"


def port_of_metrics(stack: Stack, name: str) -> str:
    return stack.metrics_url(name).split("/")[2].rpartition(":")[2]


async def check(prefix: str, **environment: str) -> tuple[int, str]:
    """Return the exit status of the health check, and what it says."""
    ended = await run(sys.executable, "-m", "runtime.healthcheck", prefix, **environment)
    assert ended.errors == ""
    return ended.status, ended.output


async def check_until(expected: str, prefix: str, **environment: str) -> int:
    """Return the exit status of the first health check that says what is expected."""
    async with asyncio.timeout(SECONDS):
        while True:
            status, said = await check(prefix, **environment)
            if expected in said:
                return status


async def test_a_container_is_healthy_while_its_service_is_ready(stack: Stack) -> None:
    status, said = await check("GATEWAY", GATEWAY_METRICS_PORT=port_of_metrics(stack, "gateway"))
    assert status == 0, said
    assert '"ready": true' in said
    status, said = await check("GATEWAY", GATEWAY_METRICS_PORT=str(free_port()))
    assert status == 1
    assert "refused" in said


async def test_a_container_whose_service_is_not_ready_says_why(stack: Stack) -> None:
    front = stack.add("http", {"HTTP_GATEWAY": f"127.0.0.1:{free_port()}"})
    await front.start()
    port = port_of_metrics(stack, front.name)
    assert await check_until('"gateway": "does not answer"', "HTTP", HTTP_METRICS_PORT=port) == 1
    await front.terminate()


async def test_health_is_asked_for_by_https_where_the_service_has_tls(stack: Stack, tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("codec")
    tls = {"CODEC_METRICS_TLS_CERT": str(pair.cert), "CODEC_METRICS_TLS_KEY": str(pair.key)}
    codec = stack.add("codec", tls)
    await codec.start()
    port = port_of_metrics(stack, codec.name)
    assert await check_until('"ready": true', "CODEC", CODEC_METRICS_PORT=port, **tls) == 0
    await codec.terminate()


@pytest.mark.parametrize("name", ["gateway-api", "gateway-workflows", "gpu-worker", "notifier"])
async def test_a_container_of_compose_connects_to_nats(name: str, nats: tuple[int, Path]) -> None:
    """With the settings, the secrets and the configuration of NATS that Compose gives."""
    port, secrets = nats
    service = compose.load()["services"][name]
    files = compose.mounted(compose.load(), {"secrets": service["secrets"]}, Path(), secrets)
    prefix = "NOTIFIER_NATS_" if name == "notifier" else "FEED_"
    given = {key: files.get(value, value) for key, value in service["environment"].items() if key.startswith(prefix)}
    url = SecretStr(str(given[f"{prefix}URL"]).replace("nats:4222", f"localhost:{port}"))
    settings = FeedSettings(url=url, tls_ca=given[f"{prefix}TLS_CA"], nkey_seed=given[f"{prefix}NKEY_SEED"])
    client = new_client(settings.url, settings.tls)
    await client.connect(**connect_options(settings, "gateway"), connect_timeout=30, allow_reconnect=False)
    assert client.is_connected
    await client.close()


@pytest.fixture(scope="module")
async def nats(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[int, Path]]:
    """Run NATS as Compose does, with new secrets. Yield its port and their folder."""
    folder = tmp_path_factory.mktemp("compose")
    secrets = folder / "secrets"
    create_secrets(secrets)
    port = free_port()
    files = {
        "NATS_TLS_CERT": secrets / "nats.pem",
        "NATS_TLS_KEY": secrets / "nats.key",
        "NATS_STORE_DIR": folder / "js",
    }
    program = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or shutil.which("nats-server")
    assert program is not None
    server = Process(
        "nats",
        (program, "-c", str(ROOT / "deploy" / "nats" / "nats-server.conf"), "-a", "127.0.0.1", "-p", str(port)),
        {
            **dict(line.split("=", 1) for line in (secrets / "nats.env").read_text().splitlines()),
            **{variable: json.dumps(str(path)) for variable, path in files.items()},
        },
        log_path=folder / "nats.log",
        probe=listens(f"127.0.0.1:{port}"),
        working_dir=folder,
        start_timeout=SECONDS,
        stop_grace=SECONDS,
    )
    await server.start()
    await server.wait_ready()
    yield port, secrets
    await server.terminate()


async def test_the_job_creates_the_namespace_and_its_search_attributes_once(stack: Stack, temporal: Client) -> None:
    program = shutil.which("temporal", path=str(Path(sys.executable).parent)) or shutil.which("temporal")
    assert program is not None
    environment = {
        "PATH": f"{Path(program).parent}:/usr/bin:/bin",
        "TEMPORAL_ADDRESS": stack.address("temporal"),
        "TEMPORAL_NAMESPACE": NAMESPACE,
        "RETENTION": "240h",
    }
    script = str(ROOT / "deploy" / "temporal" / "namespace.sh")
    first = await run("sh", script, **environment)
    assert first.status == 0, first.errors
    described = await temporal.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=NAMESPACE))
    assert described.config.workflow_execution_retention_ttl.ToTimedelta().days == 10
    # Temporal shows new attributes after a while.
    async with asyncio.timeout(SECONDS):
        while True:
            listed = await temporal.operator_service.list_search_attributes(
                ListSearchAttributesRequest(namespace=NAMESPACE)
            )
            known = {name: kind for name, kind in listed.custom_attributes.items() if not name.startswith("Custom")}
            if known == {key.name: key.indexed_value_type.value for key in names.SEARCH_ATTRIBUTES}:
                break
            await asyncio.sleep(0.1)
    again = await run("sh", script, **environment)
    assert (again.status, again.output) == (0, "")
