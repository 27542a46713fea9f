"""The codec server as its users see it: the real process, over HTTP and behind the Temporal CLI."""

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import pytest
from google.protobuf import any_pb2, json_format, timestamp_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.client import Client
from temporalio.worker import Worker

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from payload_converter import data_converter
from services.codec.conversion import decode_payload, encode_payload
from services.codec.settings import CodecSettings
from tests.support import payload_converter_workflow as flow
from tests.support.paths import ROOT
from tests.support.scrapes import Scrape, get
from tests.support.stacks import temporal_cli

CONVERTER = data_converter.payload_converter
UI = "http://localhost:8233"


class Running(NamedTuple):
    """A running codec server."""

    process: asyncio.subprocess.Process
    url: str
    metrics_url: str


@asynccontextmanager
async def running(**settings: str) -> AsyncIterator[Running]:
    """Run `python -m services.codec` while the context is open."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.codec"),
        cwd=ROOT,
        env={**os.environ, "CODEC_PORT": "0", "CODEC_METRICS_PORT": "0", **settings},
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    try:
        lines = [json.loads(await process.stderr.readline()) for _ in range(2)]
        urls = {line["logger"]: re.findall(r"http://\S+", line["message"])[0] for line in lines}
        yield Running(process, urls["services.codec.server"], urls["runtime.metrics"])
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@pytest.fixture(scope="module")
async def codec() -> AsyncIterator[str]:
    """Run a codec server with a small limit, and yield its URL."""
    async with running(CODEC_MAX_REQUEST_BYTES="100000") as server:
        yield server.url


@pytest.fixture(scope="module")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Yield an HTTP client."""
    async with aiohttp.ClientSession() as session:
        yield session


JOB = llm_pb2.JobRequest(user_id="ü", prompt="why?", priority=1, params=llm_pb2.SamplingParams(seed=2**60))


def error_with_details() -> llm_pb2.JobStatus:
    """Return a status whose error has an Any, as the gateway creates it."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="RUN_TIMEOUT", domain="llm.v1"))
    return llm_pb2.JobStatus(error=status_pb2.Status(code=4, details=[detail]))


def shown(message: Message) -> tuple[str, Any]:
    """Return the encoding and the value that a user of the codec server gets for a message."""
    payload = decode_payload(CONVERTER.to_payload(message))
    return payload.metadata["encoding"].decode(), json.loads(payload.data)


# What is converted


def test_messages_are_shown_as_json_with_their_type() -> None:
    payload = decode_payload(CONVERTER.to_payload(JOB))
    assert dict(payload.metadata) == {"encoding": b"json/protobuf", "messageType": b"llm.v1.JobRequest"}
    assert json.loads(payload.data) == {
        "userId": "ü",
        "prompt": "why?",
        "priority": 1,
        "params": {"seed": "1152921504606846976"},
    }


def test_details_of_errors_and_well_known_types_are_shown() -> None:
    encoding, value = shown(error_with_details())
    assert (encoding, value["error"]["details"][0]["reason"]) == ("json/protobuf", "RUN_TIMEOUT")
    assert shown(timestamp_pb2.Timestamp(seconds=1)) == ("json/plain", "1970-01-01T00:00:01Z")


@pytest.mark.parametrize("message", [JOB, llm_pb2.JobResult(), error_with_details()], ids=lambda m: type(m).__name__)
def test_what_was_decoded_encodes_to_the_same_payload(message: Message) -> None:
    payload = CONVERTER.to_payload(message)
    assert encode_payload(decode_payload(payload)) == payload


def test_everything_else_passes_through_untouched() -> None:
    foreign = Payload(metadata={"encoding": b"binary/protobuf", "messageType": b"other.v1.Thing"}, data=b"\x08\x01")
    nameless = Payload(metadata={"encoding": b"binary/protobuf"}, data=b"\x08\x01")
    encrypted = Payload(metadata={"encoding": b"binary/encrypted", "key": b"\xff"}, data=b"\x00")
    cut = CONVERTER.to_payload(JOB)
    cut.data = cut.data[:-1]
    far = CONVERTER.to_payload(timestamp_pb2.Timestamp(seconds=2**60))
    stranger = CONVERTER.to_payload(any_pb2.Any(type_url="x.y/other.v1.Thing", value=b"\x08\x01"))
    wrong = Payload(metadata={"encoding": b"json/protobuf", "messageType": b"llm.v1.JobRequest"}, data=b'{"x": 1}')
    plain = CONVERTER.to_payload({"userId": "u"})
    for payload in (foreign, nameless, encrypted, cut, far, stranger, wrong, plain, Payload()):
        assert decode_payload(payload) == payload
        assert encode_payload(payload) == payload


# The protocol


async def test_both_endpoints_speak_the_codec_protocol(codec: str, http: aiohttp.ClientSession) -> None:
    """The Web UI adds a query to the URL and the CLI does not. Every payload keeps its place."""
    sent = Payloads(payloads=CONVERTER.to_payloads([JOB, "text", None]))
    body = json_format.MessageToJson(sent)
    async with http.post(f"{codec}/decode?preserveStorageRefs=true", data=body) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        decoded = await response.text()
    encodings = [payload.metadata["encoding"] for payload in json_format.Parse(decoded, Payloads()).payloads]
    assert encodings == [b"json/protobuf", b"json/plain", b"binary/null"]
    async with http.post(f"{codec}/encode", data=decoded) as response:
        assert json_format.Parse(await response.text(), Payloads()) == sent


async def test_a_web_ui_of_an_allowed_origin_may_call(codec: str, http: aiohttp.ClientSession) -> None:
    ask = {"Origin": UI, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-namespace"}
    async with http.options(f"{codec}/decode", headers=ask) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == UI
        assert response.headers["Access-Control-Allow-Methods"] == "POST"
        allowed = response.headers["Access-Control-Allow-Headers"].split(", ")
        assert {"content-type", "x-namespace", "authorization"} <= set(allowed)
    async with http.post(f"{codec}/decode", data="{}", headers={"Origin": UI}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == UI
        assert response.headers["Vary"] == "Origin"


async def test_a_page_of_another_origin_may_not(codec: str, http: aiohttp.ClientSession) -> None:
    for method in ("OPTIONS", "POST"):
        origin = {"Origin": "https://elsewhere.example"}
        async with http.request(method, f"{codec}/decode", data="{}", headers=origin) as response:
            assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
@pytest.mark.parametrize(
    "host",
    ["attacker.example", "attacker.example:8234", "127.0.0.1.attacker.example", "attacker.example@localhost", "", "["],
)
async def test_a_page_whose_name_was_made_to_lead_here_may_not(
    codec: str, http: aiohttp.ClientSession, host: str, method: str
) -> None:
    """In DNS rebinding the browser takes the server for the page's own origin, so only the Host check refuses it."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    async with http.request(method, f"{codec}/decode", data="{}", headers=headers) as response:
        assert response.status == 421
        assert "CODEC_ALLOWED_HOSTS" in await response.text()


@pytest.mark.parametrize("host", ["localhost:8234", "LOCALHOST", "127.0.0.1:1", "[::1]:8234"])
async def test_it_is_called_by_the_names_of_loopback(codec: str, http: aiohttp.ClientSession, host: str) -> None:
    async with http.post(f"{codec}/decode", data="{}", headers={"Host": host}) as response:
        assert response.status == 200


async def test_an_operator_names_it_and_its_own_address_is_a_name() -> None:
    """The names of the setting replace those of loopback."""
    async with (
        running(CODEC_HOST="127.0.0.2", CODEC_ALLOWED_HOSTS="codec.example, [2001:db8::1]") as server,
        aiohttp.ClientSession() as session,
    ):
        for host, status in {
            "Codec.example:80": 200,
            "[2001:DB8::1]:8234": 200,
            "127.0.0.2:8234": 200,
            "localhost:8234": 421,
        }.items():
            async with session.post(f"{server.url}/decode", data="{}", headers={"Host": host}) as response:
                assert response.status == status, host


@pytest.mark.parametrize(
    ("body", "status"),
    [("[1", 400), ('{"payloads": 3}', 400), (b"\xff", 400), ("[" * 50_000, 400), ("x" * 100_001, 413)],
)
async def test_a_bad_body_is_the_callers_error_and_readable_by_the_web_ui(
    codec: str, http: aiohttp.ClientSession, body: str | bytes, status: int
) -> None:
    async with http.post(f"{codec}/decode", data=body, headers={"Origin": UI}) as response:
        assert response.status == status
        assert response.headers["Access-Control-Allow-Origin"] == UI


# The process


async def test_sigterm_ends_it_cleanly_though_a_client_keeps_its_connection() -> None:
    async with running() as server, aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/decode", data="{}") as response:
            assert await response.json() == {}
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await server.process.wait() == 0


def test_settings_come_from_the_environment_and_are_safe_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (CodecSettings().host, CodecSettings().port) == ("127.0.0.1", 8234)
    monkeypatch.setenv("CODEC_ALLOWED_ORIGINS", "https://ui.example, http://localhost:1")
    assert CodecSettings().allowed_origins == ("https://ui.example", "http://localhost:1")


async def test_its_answers_are_measured() -> None:
    """Its metrics follow the conventions, and no caller can add a label value."""
    async with running(CODEC_MAX_REQUEST_BYTES="10") as server, aiohttp.ClientSession() as session:
        for method, path, body in (
            ("POST", "decode", "{}"),
            ("POST", "decode", "[1"),
            ("POST", "encode", "x" * 11),
            ("POST", "made-up", "{}"),
            ("PUT", "decode", "{}"),
            ("PROPFIND", "decode", "{}"),
        ):
            async with session.request(method, f"{server.url}/{path}", data=body):
                pass
        found = Scrape([await get(server.metrics_url)])
    labels = ("http_request_method", "http_route", "http_response_status_code", "error_type")
    assert found.by("http_server_request_duration_seconds_count", *labels) == {
        ("POST", "/decode", "200", ""): 1,
        ("POST", "/decode", "400", ""): 1,
        ("POST", "/encode", "413", ""): 1,
        ("POST", "", "404", ""): 1,
        ("PUT", "", "405", ""): 1,
        ("_OTHER", "", "405", ""): 1,
    }


async def test_opentelemetrys_own_variable_turns_metrics_off() -> None:
    """Metrics that are not OpenTelemetry's are still served."""
    async with running(OTEL_SDK_DISABLED="true") as server, aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/decode", data="{}") as response:
            assert response.status == 200
        names = {family.name for family in Scrape([await get(server.metrics_url)]).families}
    assert "process_resident_memory_bytes" in names
    assert "http_server_request_duration_seconds" not in names


async def test_every_line_of_its_log_is_json_and_holds_no_payload() -> None:
    async with running() as server, aiohttp.ClientSession() as session:
        for body in (json_format.MessageToJson(Payloads(payloads=CONVERTER.to_payloads(["xyzzy"]))), "xyzzy"):
            async with session.post(f"{server.url}/decode", data=body):
                pass
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        log = (await server.process.stderr.read()).decode()
    assert [line for line in log.splitlines() if not line.startswith('{"time": "')] == []
    assert "xyzzy" not in log
    assert base64.b64encode(b"xyzzy").decode() not in log


async def test_a_port_that_is_taken_is_an_error_that_says_so() -> None:
    async with running() as server:
        port = server.url.rpartition(":")[2]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.codec"),
            cwd=ROOT,
            env={**os.environ, "CODEC_PORT": port, "CODEC_METRICS_PORT": "0"},
            stderr=subprocess.PIPE,
        )
        _, log = await process.communicate()
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}".encode() in log
    assert b"CODEC_PORT" in log


# The CLI


async def test_the_cli_prints_messages_as_json(codec: str, stack: Stack) -> None:
    client = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    async with Worker(client, task_queue=flow.TASK_QUEUE, workflows=[flow.Convert], activities=[flow.generate]):
        memo = {"progress": llm_pb2.JobProgress(stage="queued")}
        await client.execute_workflow(flow.Convert.run, JOB, id="job", task_queue=flow.TASK_QUEUE, memo=memo)
    look = ("--workflow-id", "job", "--codec-endpoint", codec)

    history = await temporal_cli(stack, "workflow", "show", "--detailed", *look)
    assert "input[0]._protoMessageType: llm.v1.JobRequest" in history
    assert "input[0].userId: ü" in history
    assert "input[0].params.seed: 1152921504606846976" in history
    assert "result[0].metadata.outputTokens: 7" in history
    ending = await temporal_cli(stack, "workflow", "show", *look)
    assert '"metadata":{"outputTokens":"7"},"output":"why?, decode"}' in ending
    described = json.loads(await temporal_cli(stack, "workflow", "describe", "--output", "json", *look))
    assert described["workflowExecutionInfo"]["memo"]["fields"]["progress"]["stage"] == "queued"
