"""TLS of the gateway, of metrics and of the codec server: who may connect, and how certificates are replaced."""

import asyncio
import json
import os
import socket
import ssl
import urllib.request
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from pydantic import ValidationError

from deploy.local.ports import free_port
from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gateway.settings import GatewaySettings
from tests.support.certificates import Authority, Pair, credentials, replace
from tests.support.commands import run, run_service
from tests.support.jobs import new_job, run_job
from tests.support.stacks import tool

AWAY = {"TEMPORAL_ADDRESS": "127.0.0.1:9", "GATEWAY_METRICS_PORT": "0"}
"""Settings of a gateway that would wait for Temporal."""
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Options of a channel that has a connection, and so a handshake, of its own."""


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def gateway(stack: Stack, **environment: str) -> AsyncIterator[tuple[Process, str]]:
    """Run a gateway with these settings; yield it and its address."""
    process = stack.add("gateway", {"GATEWAY_ROLE": "api", **environment})
    await process.start()
    try:
        await process.wait_ready()
        yield process, stack.address(process.name)
    finally:
        await process.terminate()


async def models(address: str, given: grpc.ChannelCredentials | None) -> int:
    """Call the gateway on a new connection; return how many models it has. Raises AioRpcError."""
    channel = (
        grpc.aio.insecure_channel(address, OWN_CONNECTION)
        if given is None
        else grpc.aio.secure_channel(address, given, OWN_CONNECTION)
    )
    async with channel:
        return len((await LlmServiceStub(channel).ListModels(llm_pb2.ListModelsRequest(), timeout=60)).models)


async def is_refused(address: str, given: grpc.ChannelCredentials | None) -> bool:
    """Return whether a call fails at the connection."""
    try:
        await models(address, given)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


def serial(address: str, ca: Authority) -> str:
    """Return the serial number of the certificate that a new connection is shown."""
    host, port = address.rsplit(":", 1)
    context = ssl.create_default_context(cadata=ca.pem.decode())
    with (
        socket.create_connection((host, int(port)), 30) as plain,
        context.wrap_socket(plain, server_hostname=host) as s,
    ):
        return str((s.getpeercert() or {})["serialNumber"])


async def logged(process: Process, words: str) -> None:
    """Return once the process has logged the words."""
    async with asyncio.timeout(60):
        while words not in process.log_path.read_text():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.1)


async def test_a_client_needs_tls_and_the_right_ca(stack: Stack, ca: Authority) -> None:
    wrong = Authority(ca.folder, "wrong")
    async with gateway(stack, **ca.issue("server").environment("GATEWAY_TLS_")) as (_, address):
        assert await models(address, credentials(ca))
        assert await is_refused(address, None)
        assert await is_refused(address, credentials(wrong))
        async with grpc.aio.secure_channel(address, credentials(ca)) as channel:
            seen = await run_job(LlmServiceStub(channel), new_job(params={"max_tokens": 5}))
        assert seen.states[-1] == "SUCCEEDED"


async def test_a_client_needs_a_certificate_where_a_client_ca_is_set(stack: Stack, ca: Authority) -> None:
    others = Authority(ca.folder, "others")
    settings = ca.issue("server").environment("GATEWAY_TLS_", ca)
    async with gateway(stack, **settings) as (_, address):
        assert await models(address, credentials(ca, ca.issue("client")))
        assert await is_refused(address, credentials(ca))
        assert await is_refused(address, credentials(ca, others.issue("stranger")))
        assert await is_refused(address, credentials(ca, ca.issue("late", valid_for=timedelta(seconds=-5))))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_is_1_2_or_newer_and_http_2_is_negotiated(
    stack: Stack, ca: Authority, version: ssl.TLSVersion
) -> None:
    settings = {
        **ca.issue("server").environment("GATEWAY_TLS_"),
        **ca.issue("metrics").environment("GATEWAY_METRICS_TLS_"),
    }
    process = stack.add("gateway", {"GATEWAY_ROLE": "api", **settings})
    await process.start()
    await logged(process, '"message": "ready"')
    metrics = stack.metrics_url(process.name).split("/")[2]
    context = ssl.create_default_context(cadata=ca.pem.decode())
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = version
    for address, protocol in ((stack.address(process.name), "h2"), (metrics, "http/1.1")):
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 30) as plain:
            if version is ssl.TLSVersion.TLSv1_1:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    context.wrap_socket(plain, server_hostname=host)
                continue
            with context.wrap_socket(plain, server_hostname=host) as connection:
                assert connection.selected_alpn_protocol() == protocol
    await process.terminate()


async def test_a_client_refuses_an_expired_certificate_and_takes_its_successor(stack: Stack, ca: Authority) -> None:
    pair = ca.issue("server", valid_for=timedelta(seconds=-5))
    async with gateway(stack, **pair.environment("GATEWAY_TLS_")) as (_, address):
        assert await is_refused(address, credentials(ca))
        ca.issue("server")
        assert await models(address, credentials(ca))


async def test_certificates_are_replaced_under_load(stack: Stack, ca: Authority) -> None:
    """No call fails, each on a new connection. A stream that began before lasts until its end."""
    replacements = 5
    async with (
        gateway(stack, **ca.issue("server").environment("GATEWAY_TLS_")) as (_, address),
        grpc.aio.secure_channel(address, credentials(ca), OWN_CONNECTION) as channel,
    ):
        stub = LlmServiceStub(channel)
        job = new_job(params={"max_tokens": 8000})
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
        stream = stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_))
        messages = aiter(stream)
        await anext(messages)
        calls, done = 0, asyncio.Event()

        async def call() -> None:
            nonlocal calls
            while not done.is_set():
                assert await models(address, credentials(ca))
                calls += 1

        async with asyncio.TaskGroup() as load:
            for _ in range(4):
                load.create_task(call())
            serials = set()
            for number in range(replacements):
                before = calls
                ca.issue("server")
                serials.add(await asyncio.to_thread(serial, address, ca))
                while calls < before + 8:  # noqa: ASYNC110  they come all the time
                    await asyncio.sleep(0.05)
                assert len(serials) == number + 1, "the next connection gets the new certificate"
            done.set()
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
        final = None
        async for message in messages:
            final = message.status if message.HasField("status") else final
        assert final is not None
        assert final.state == llm_pb2.JOB_STATE_CANCELLED


async def test_a_broken_new_certificate_is_logged_and_the_last_good_one_stays(stack: Stack, ca: Authority) -> None:
    pair = ca.issue("server")
    async with gateway(stack, **pair.environment("GATEWAY_TLS_")) as (process, address):
        before = serial(address, ca)
        cert = pair.cert.read_bytes()
        for broken in (b"nonsense", cert[: len(cert) // 2], Authority(ca.folder, "x").issue("y").cert.read_bytes()):
            replace(pair.cert, broken)
            assert serial(address, ca) == before
            assert await models(address, credentials(ca))
        pair.cert.unlink()
        assert serial(address, ca) == before
        await logged(process, "changed TLS files cannot be used, the last usable ones stay in use: GATEWAY_TLS_CERT")
        ca.issue("server")
        assert serial(address, ca) != before


async def test_a_file_that_becomes_usable_without_a_change_is_used(stack: Stack, ca: Authority) -> None:
    """For example because its mode was wrong, which the superuser cannot test: here it has the same time and size."""
    pair = ca.issue("server")
    async with gateway(stack, **pair.environment("GATEWAY_TLS_")) as (process, address):
        before = serial(address, ca)
        ca.issue("server")
        key, times = pair.key.read_bytes(), (0, 0)
        pair.key.write_bytes(b"x" * len(key))
        os.utime(pair.key, times)
        assert serial(address, ca) == before
        await logged(process, "changed TLS files cannot be used")
        pair.key.write_bytes(key)
        os.utime(pair.key, times)
        assert serial(address, ca) != before


async def test_the_symbolic_link_of_a_mounted_secret_is_replaced(stack: Stack, ca: Authority) -> None:
    """Kubernetes writes a new folder, and then renames a link to it. Certificate and key change in one step."""

    def publish(name: str) -> None:
        (mounted / name).mkdir(parents=True)
        for file in (pair.cert, pair.key):
            (mounted / name / file.name).write_bytes(file.read_bytes())
        (mounted / "..data_tmp").symlink_to(name)
        (mounted / "..data_tmp").rename(mounted / "..data")

    mounted, pair = ca.folder / "mounted", ca.issue("server")
    publish("..first")
    used = Pair(mounted / pair.cert.name, mounted / pair.key.name)
    for file in (used.cert, used.key):
        file.symlink_to(Path("..data", file.name))
    async with gateway(stack, **used.environment("GATEWAY_TLS_")) as (process, address):
        before = serial(address, ca)
        ca.issue("server")
        publish("..second")
        assert serial(address, ca) != before
        assert "cannot be used" not in process.log_path.read_text()


async def test_a_port_of_its_own_requires_client_certificates(stack: Stack, ca: Authority) -> None:
    """The gateway's first port does not ask for them then. Both have the new certificate of the server."""
    mtls = f"127.0.0.1:{free_port()}"
    settings = {**ca.issue("server").environment("GATEWAY_TLS_", ca), "GATEWAY_MTLS_PORT": mtls.split(":")[1]}
    client = credentials(ca, ca.issue("client"))
    async with gateway(stack, **settings) as (_, address):
        assert await models(address, credentials(ca))
        assert await models(mtls, client)
        assert await is_refused(mtls, credentials(ca))
        assert await is_refused(mtls, None)
        assert await is_refused(address, None)
        strangers = Authority(ca.folder, "strangers")
        replace(ca.path, ca.pem + strangers.pem)
        assert await models(mtls, credentials(ca, strangers.issue("stranger")))
        replace(ca.path, strangers.pem)
        assert await is_refused(mtls, client)


def test_a_port_for_client_certificates_needs_their_ca(ca: Authority) -> None:
    pair = ca.issue("server")
    with pytest.raises(ValidationError, match="GATEWAY_MTLS_PORT needs GATEWAY_TLS_CLIENT_CA"):
        GatewaySettings(tls_cert=pair.cert, tls_key=pair.key, mtls_port=1)


@pytest.mark.parametrize("which", ["GATEWAY_TLS_", "GATEWAY_METRICS_TLS_"])
async def test_a_gateway_does_not_start_with_half_of_its_tls(ca: Authority, which: str) -> None:
    pair = ca.issue("server")
    settings = pair.environment(which, ca)
    for left_out in settings:
        if left_out.endswith("CLIENT_CA"):
            continue
        given = {name: value for name, value in settings.items() if name != left_out}
        ended = await run_service("gateway", ca.folder, **given)
        assert ended.status == 1
        assert f"{which}CERT and {which}KEY must be set together" in ended.output


@pytest.mark.parametrize("prefix", ["GATEWAY_TLS_", "GATEWAY_METRICS_TLS_", "FEED_TLS_"])
async def test_a_file_that_cannot_be_used_is_named_at_the_start(ca: Authority, prefix: str) -> None:
    """With its setting, in one line, before the process waits for Temporal."""
    pair, other, nonsense = ca.issue("server"), Authority(ca.folder, "x").issue("other"), ca.folder / "nonsense"
    nonsense.write_text("nonsense")
    name = f"{prefix}{'CA' if prefix == 'FEED_TLS_' else 'CLIENT_CA'}"
    settings = {**pair.environment(prefix), name: str(ca.path)}
    for wrong, path in ((f"{prefix}KEY", other.key), (f"{prefix}CERT", nonsense), (name, nonsense)):
        ended = await run_service("gateway", ca.folder, **{**settings, wrong: str(path)}, **AWAY)
        assert ended.status == 1
        assert f"{wrong} {path}" in ended.output
        assert "cannot be used" in ended.output
        assert "Traceback" not in ended.output
    missing = ca.folder / "no"
    ended = await run_service("gateway", ca.folder, **{**settings, name: str(missing)}, **AWAY)
    assert ended.status == 1
    assert f"{name}: {missing} cannot be read: No such file" in ended.output


@pytest.fixture
async def codec(stack: Stack, ca: Authority) -> AsyncIterator[tuple[Process, str, str]]:
    """A codec server with TLS on both listeners, and client certificates on that for metrics; both URLs."""
    settings = {
        **ca.issue("codec").environment("CODEC_TLS_"),
        **ca.issue("metrics").environment("CODEC_METRICS_TLS_", ca),
    }
    process = stack.add("codec", settings)
    await process.start()
    await logged(process, "listening on https://")
    metrics = stack.metrics_url(process.name).replace("http://", "https://")
    yield process, f"https://{stack.address(process.name)}", metrics
    await process.terminate()


def get(url: str, ca: Authority, client: Pair | None = None, body: bytes | None = None) -> str:
    context = ssl.create_default_context(cadata=ca.pem.decode())
    if client is not None:
        context.load_cert_chain(client.cert, client.key)
    with urllib.request.urlopen(url, body, timeout=30, context=context) as answer:
        return str(answer.read().decode())


async def test_metrics_and_health_are_served_by_https(codec: tuple[Process, str, str], ca: Authority) -> None:
    _, _, url = codec
    client = ca.issue("prometheus")
    assert "process_cpu_seconds_total" in await asyncio.to_thread(get, url, ca, client)
    assert json.loads(await asyncio.to_thread(get, url.replace("/metrics", "/healthz"), ca, client))
    for refused in (
        (url, Authority(ca.folder, "wrong"), client),
        (url, ca, None),
        (url.replace("s:", ":"), ca, client),
    ):
        with pytest.raises(OSError, match=r"(?i)ssl|certificate|closed|reset"):
            await asyncio.to_thread(get, *refused)
    first = await asyncio.to_thread(_serial_with, url, ca, client)
    ca.issue("metrics")
    assert await asyncio.to_thread(_serial_with, url, ca, client) != first


def _serial_with(url: str, ca: Authority, client: Pair) -> str:
    host, port = url.split("/")[2].rsplit(":", 1)
    context = ssl.create_default_context(cadata=ca.pem.decode())
    context.load_cert_chain(client.cert, client.key)
    with (
        socket.create_connection((host, int(port)), 30) as plain,
        context.wrap_socket(plain, server_hostname=host) as s,
    ):
        return str((s.getpeercert() or {})["serialNumber"])


async def test_a_client_that_does_not_shake_hands_keeps_nobody_from_metrics(
    codec: tuple[Process, str, str], ca: Authority
) -> None:
    _, _, url = codec
    host, port = url.split("/")[2].rsplit(":", 1)
    silent = [socket.create_connection((host, int(port)), 30) for _ in range(20)]
    assert await asyncio.to_thread(get, url, ca, ca.issue("prometheus"))
    for connection in silent:
        connection.close()


async def test_the_codec_server_speaks_https_and_its_certificate_turns(
    codec: tuple[Process, str, str], ca: Authority
) -> None:
    _, url, _ = codec
    assert json.loads(await asyncio.to_thread(get, f"{url}/decode", ca, None, b"{}")) == {}
    first = serial(url.split("/")[2], ca)
    ca.issue("codec")
    assert serial(url.split("/")[2], ca) != first


async def test_buf_curl_and_grpcurl_call_with_the_ca(stack: Stack, ca: Authority) -> None:
    async with gateway(stack, **ca.issue("server").environment("GATEWAY_TLS_")) as (_, address):
        method = "llm.v1.LlmService/ListModels"
        ended = await run(
            *(tool("buf"), "curl", "--protocol", "grpc", "--cacert", str(ca.path), "--data", "{}"),
            f"https://{address}/{method}",
        )
        assert "docstrings" in ended.output, ended.errors
        ended = await run(tool("grpcurl"), "-cacert", str(ca.path), "-d", "{}", address, method)
        assert "docstrings" in ended.output, ended.errors
