"""The whole stack with STACK_TLS: a job runs, and everything but Temporal's development server uses TLS."""

import asyncio
import json
import os
import re
import shlex
import socket
import ssl
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import nats
import pytest

from deploy.local.client import gateway_client
from deploy.local.hints import hints
from deploy.local.ports import free_port
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.blocks import Block, blocks
from tests.support.commands import run
from tests.support.jobs import new_job, run_job
from tests.support.local import environment
from tests.support.paths import ROOT
from tests.support.stacks import FAST, stack_settings


@pytest.fixture(scope="module")
async def tls_stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    port = free_port()
    settings = stack_settings(tmp_path_factory.mktemp("tls") / "stack", tls=True, nats_port=port)
    notifier = {**FAST["notifier"], "NOTIFIER_NATS_URL": f"nats://127.0.0.1:{port}"}
    async with Stack(settings, environment={**FAST, "notifier": notifier}) as running:
        yield running


def ca(stack: Stack) -> Path:
    assert stack.ca is not None
    return stack.ca


def get(url: str, stack: Stack) -> str:
    context = ssl.create_default_context(cafile=ca(stack))
    return str(urllib.request.urlopen(url, timeout=30, context=context).read().decode())


async def test_the_demo_runs_with_tls(tmp_path: Path) -> None:
    settings = stack_settings(tmp_path / "stack", tls=True)
    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "demo"),
        env={**environment(settings), "GPU_WORKER_ENGINE_OPTIONS": json.dumps({"tokens_per_second": 500})},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    shown = (await demo.communicate())[0].decode()
    assert demo.returncode == 0, shown
    assert "grpcurl -cacert" in shown


async def test_a_job_runs_and_its_tokens_and_its_event_arrive(tls_stack: Stack) -> None:
    """The tokens arrive by the feed, the event in a stream that the operator has created."""
    operator = await nats.connect(
        f"nats://{tls_stack.address('nats')}",
        tls=ssl.create_default_context(cafile=ca(tls_stack)),
        tls_handshake_first=True,
        nkeys_seed=str(ca(tls_stack).parent / "operator.nk"),
    )
    await operator.jetstream().add_stream(name="EVENTS", subjects=["llm.events.>"])
    job = new_job(params={"max_tokens": 400}, notify=[{"nats": {"subject": "team"}}])
    credentials = grpc.ssl_channel_credentials(ca(tls_stack).read_bytes())
    async with grpc.aio.secure_channel(tls_stack.address("gateway"), credentials) as channel:
        seen = await run_job(LlmServiceStub(channel), job)
        assert seen.states[-1] == "SUCCEEDED"
    events = await operator.jetstream().subscribe("llm.events.team")
    event = json.loads((await events.next_msg(60)).data)
    assert event["data"]["status"]["state"] == "JOB_STATE_SUCCEEDED"
    await operator.close()
    for name in ("gateway", "gpu-worker"):
        url = tls_stack.metrics_url(name).replace("/metrics", "/readyz")
        ready = json.loads(await asyncio.to_thread(get, url, tls_stack))
        assert (ready["ready"], ready["degraded"]) == (True, {})


async def test_the_python_client_takes_the_ca(tls_stack: Stack) -> None:
    async with gateway_client(tls_stack) as client:
        job = await client.submit(user_id="tls", model="docstrings", prompt="Hi", params={"max_tokens": 5})
        assert (await job.result()).finish_reason == llm_pb2.FINISH_REASON_LENGTH


async def test_no_listener_but_temporals_answers_in_clear(tls_stack: Stack) -> None:
    listeners = [tls_stack.address(name) for name in ("nats", "codec", "gateway", "http")]
    services = ("codec", "gateway", "gpu-worker", "notifier", "http")
    listeners += [tls_stack.metrics_url(name).split("/")[2] for name in services]
    for address in listeners:
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 30) as plain:
            plain.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            try:
                answer = plain.recv(100)
            except ConnectionResetError:
                continue
            # Nothing, or a TLS alert.
            assert answer[:1] in (b"", b"\x15"), address


async def test_only_the_owner_can_read_the_secrets(tls_stack: Stack) -> None:
    folder = ca(tls_stack).parent
    for path in (folder.parent, folder, *folder.iterdir()):
        assert not path.stat().st_mode & 0o077, path


async def test_the_lines_that_up_prints_work(tls_stack: Stack) -> None:
    """They are those of buf, curl, OpenAI's client and temporal."""
    shown = hints(tls_stack, "docstrings")
    commands = re.findall(
        r"^  (\S*buf curl .+|curl .+|SSL_\S+ (?:python -c '[^']+'|.+ workflow .+))$", shown, re.MULTILINE
    )
    assert len(commands) == 5
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in commands:
        ended = await run("bash", "-c", command.replace(str(Path.cwd()), "."), PATH=path)
        assert ended.status == 0, (shlex.split(command), ended.errors)
    assert "docstrings" in ended.output, "the codec server decodes the payloads"


async def test_the_address_of_the_console_that_up_prints_shows_jobs(tls_stack: Stack) -> None:
    (address,) = re.findall(r"^  console +(\S+)$", hints(tls_stack, "docstrings"), re.MULTILINE)
    trust = ssl.create_default_context(cafile=str(ca(tls_stack)))
    async with httpx.AsyncClient(verify=trust, timeout=60, trust_env=False) as client:
        page = await client.get(address)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")


@pytest.mark.parametrize("block", [block for block in blocks() if "stack/tls" in block.text], ids=lambda b: b.place)
async def test_the_examples_of_the_page_work(tls_stack: Stack, block: Block) -> None:
    """They run unchanged, except for addresses and the path of the CA."""
    text = block.text.replace(".stack/tls/ca.pem", str(ca(tls_stack)))
    addresses = {
        "127.0.0.1:50051": tls_stack.address("gateway"),
        "127.0.0.1:8234": tls_stack.address("codec"),
        "127.0.0.1:9464": tls_stack.metrics_url("gateway").split("/")[2],
    }
    for documented, address in addresses.items():
        text = text.replace(documented, address)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = (sys.executable, "-c") if text.startswith("import") else ("bash", "-euc")
    ended = await run(*command, text, PATH=path, TEMPORAL_ADDRESS=tls_stack.address("temporal"))
    assert ended.status == 0, ended.errors
    assert ended.output
