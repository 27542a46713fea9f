"""The HTTP front as a server: whom it lets in, what it bounds, how it ends, and what can be seen of it."""

import asyncio
import contextlib
import gzip
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from runtime.scopes import SCOPES
from tests.support.certificates import Authority
from tests.support.credentials import KeyFile
from tests.support.http_events import Event, events_of, text_of
from tests.support.http_fronts import running_front
from tests.support.jobs import new_job
from tests.support.otlp import Caller, Collector, Span
from tests.support.scrapes import Scrape, get


async def start_job(stub: llm_pb2_grpc.LlmServiceStub, tokens: int) -> str:
    job = new_job(params=llm_pb2.SamplingParams(max_tokens=tokens))
    workflow_id: str = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    return workflow_id


def stream_of(client: httpx.AsyncClient, workflow_id: str, last_id: str = "") -> AsyncIterator[Event]:
    """Return the events of a job's stream. Closing it leaves."""

    async def read() -> AsyncIterator[Event]:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        async with client.stream("GET", f"/jobs/{workflow_id}/stream", headers=headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for event in events_of(answer):
                yield event

    return read()


async def until_text(events: AsyncIterator[Event]) -> list[Event]:
    """Return the events up to the first that brings text."""
    found = []
    async for event in events:
        found.append(event)
        if event.json.get("delta"):
            return found
    raise AssertionError("the stream ended without text")


@asynccontextmanager
async def raw(address: str, sent: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection and send bytes."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def until_refused(writer: asyncio.StreamWriter) -> None:
    """Return once the peer takes nothing any more, although nothing of its own is read."""
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)


# Streams and the deaths of fronts


async def test_another_front_continues_the_stream_of_one_that_was_killed(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, http: httpx.AsyncClient
) -> None:
    """The joined text is the job's result. The front keeps nothing, so any other one can continue."""
    workflow_id = await start_job(stub, 2000)
    async with running_front(stack) as front:
        events = stream_of(front.client, workflow_id)
        held = await until_text(events)
        await front.process.kill()
        with contextlib.suppress(httpx.TransportError):
            async for event in events:
                held.append(event)
    assert not [event for event in held if event.name == "end"]
    held += [event async for event in stream_of(http, workflow_id, held[-1].id)]
    assert text_of(held) == held[-1].json["result"]["output"]
    assert not any(event.json["delta"]["rewind"] for event in held if event.json.get("delta"))


async def test_a_front_that_stops_ends_its_streams_so_that_their_clients_come_back(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, http: httpx.AsyncClient
) -> None:
    """The stream ends whole, without the event that ends a job, and without a word of an error."""
    workflow_id = await start_job(stub, 8000)
    async with running_front(stack) as front:
        events = stream_of(front.client, workflow_id)
        held = await until_text(events)
        stopping = asyncio.create_task(front.process.terminate())
        held += [event async for event in events]
        await stopping
        assert front.process.returncode == 0, front.process.log
    assert {event.name for event in held} == {"update"}
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=workflow_id))
    held += [event async for event in stream_of(http, workflow_id, held[-1].id)]
    assert text_of(held) == held[-1].json["result"]["output"]


async def test_a_stream_goes_on_when_its_gateway_dies(stack: Stack, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    """The front continues it at another gateway, and its client sees no break."""
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api"})
    await gateway.start()
    await gateway.wait_ready()
    both = f"ipv4:{stack.address(gateway.name)},{stack.address('gateway')}"
    workflow_id = await start_job(stub, 2000)
    async with running_front(stack, HTTP_GATEWAY=both, HTTP_GATEWAY_RETRY="PT30S") as front:
        # Calls take turns, so one of two streams is at the gateway that dies.
        streams = [stream_of(front.client, workflow_id) for _ in range(2)]
        held = [await until_text(events) for events in streams]
        await gateway.kill()
        for events, own in zip(streams, held, strict=True):
            own += [event async for event in events]
            assert text_of(own) == own[-1].json["result"]["output"]


async def test_a_silent_stream_is_kept_alive(stack: Stack, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    job = new_job(model="idle")
    workflow_id = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    async with (
        running_front(stack, HTTP_STREAM_KEEPALIVE="PT0.2S", HTTP_STREAM_RETRY="PT3S") as front,
        front.client.stream("GET", f"/jobs/{workflow_id}/stream") as answer,
    ):
        lines = answer.aiter_lines()
        assert await anext(lines) == "retry: 3000"
        async for line in lines:
            if line == ": keep-alive":
                break
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=workflow_id))


# Bounds


async def test_streams_and_connections_are_bounded(stack: Stack, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    workflow_id = await start_job(stub, 8000)
    async with running_front(stack, HTTP_MAX_STREAMS="1", HTTP_MAX_CONNECTIONS="3") as front:
        first = stream_of(front.client, workflow_id)
        await until_text(first)
        refused = await front.client.get(f"/jobs/{workflow_id}/stream")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["reason"] == "LIMIT_REACHED"
        async with raw(front.address, b""), raw(front.address, b""), httpx.AsyncClient(trust_env=False) as further:
            assert (await further.get(f"http://{front.address}/models")).status_code == 503
        await first.aclose()  # type: ignore[attr-defined]
        # The place is free again once the front has noticed that the client is gone.
        for _ in range(100):
            async with front.client.stream("GET", f"/jobs/{workflow_id}/stream") as again:
                if again.status_code == 200:
                    break
            await asyncio.sleep(0.1)
        assert again.status_code == 200
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=workflow_id))


async def test_a_client_that_sends_slowly_or_reads_nothing_loses_its_connection(stack: Stack) -> None:
    async with running_front(stack, HTTP_REQUEST_TIMEOUT="PT0.5S", HTTP_STALL_TIMEOUT="PT0.5S") as front:
        async with asyncio.timeout(60):
            for head in (b"", b"GET /models HTTP/1.1\r\nHost: localhost\r\nX"):
                async with raw(front.address, head) as (reader, _):
                    assert await reader.read() == b""
            # The second request of a connection has as much time as the first one.
            whole = b"HEAD /models HTTP/1.1\r\nHost: localhost\r\n\r\n"
            async with raw(front.address, whole) as (reader, writer):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                writer.write(b"GET")
                assert await reader.read() == b""
            head = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            body = head + b"Content-Length: 9\r\n\r\n{"
            async with raw(front.address, body) as (reader, _):
                assert (await reader.read()).startswith(b"HTTP/1.1 408")
            many = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3000
            async with raw(front.address, many) as (_, writer):
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                await until_refused(writer)
        assert (await front.client.get("/models")).status_code == 200


async def test_without_a_gateway_requests_are_answered_and_the_front_is_not_ready(stack: Stack) -> None:
    process = stack.add("http", {"HTTP_GATEWAY": "127.0.0.1:1", "HTTP_GATEWAY_RETRY": "PT0S"})
    await process.start()
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client, asyncio.timeout(60):
        while True:
            try:
                answer = await client.get(f"http://{stack.address(process.name)}/models")
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.1)
        ready = await client.get(stack.metrics_url(process.name).replace("/metrics", "/readyz"))
        alive = await client.get(stack.metrics_url(process.name).replace("/metrics", "/healthz"))
    await process.terminate()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "127.0.0.1:1" not in answer.text
    assert (ready.status_code, ready.json()["missing"]) == (503, {"gateway": "does not answer"})
    assert alive.status_code == 200


async def test_a_body_is_taken_as_it_was_sent(http: httpx.AsyncClient, stack: Stack) -> None:
    """A client that asks first sends its body once it is told to, and none that is refused anyway."""
    job = (
        b'{"user_id": "u", "request_id": "expected", "model": "docstrings", "prompt": "x", "params": {"max_tokens": 1}}'
    )
    head = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    asks = head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    async with asyncio.timeout(60):
        async with raw(stack.address("http"), asks % len(job)) as (reader, writer):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(job)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202")
        async with raw(stack.address("http"), asks % 2**30) as (reader, _):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")
        async with raw(stack.address("http"), head + b"Expect: tea\r\nContent-Length: 9\r\n\r\n") as (reader, _):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 417")
    for coding in ("gzip", "br", "identity, gzip"):
        sent = {"Content-Type": "application/json", "Content-Encoding": coding}
        answer = await http.post("/jobs", content=gzip.compress(job), headers=sent)
        assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    sent = {"Content-Type": "application/json", "Content-Encoding": "identity"}
    assert (await http.post("/jobs", content=job, headers=sent)).status_code == 202


# Who may call


@pytest.mark.parametrize("host", ["attacker.example", "127.0.0.1.attacker.example:8080", "a@localhost", "["])
async def test_a_page_whose_name_was_made_to_lead_here_may_not_call(http: httpx.AsyncClient, host: str) -> None:
    """In DNS rebinding the browser takes the server for the page's own origin, so only the Host check refuses it."""
    answer = await http.get("/models", headers={"Host": host, "Origin": f"http://{host}"})
    assert (answer.status_code, answer.json()["reason"]) == (421, "HOST_NOT_ALLOWED")
    assert "HTTP_ALLOWED_HOSTS" in answer.json()["detail"]


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "null", "http://localhost:1"])
async def test_a_page_of_another_origin_may_not_call(http: httpx.AsyncClient, origin: str) -> None:
    for method, path in (("GET", "/models"), ("POST", "/jobs/x/cancel"), ("OPTIONS", "/jobs")):
        answer = await http.request(method, path, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["reason"]) == (403, "ORIGIN_NOT_ALLOWED")
        assert "access-control-allow-origin" not in answer.headers


async def test_a_page_of_the_front_itself_may_call(http: httpx.AsyncClient) -> None:
    assert (await http.get("/models", headers={"Origin": str(http.base_url)})).status_code == 200


async def test_an_operator_lets_pages_of_other_origins_call(stack: Stack) -> None:
    page = "https://app.example"
    async with running_front(stack, HTTP_CORS_ORIGINS=page, HTTP_ALLOWED_HOSTS="api.example") as front:
        names = {"Host": "api.example", "Origin": page}
        ask = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "authorization"}
        asked = await front.client.options("/jobs/x", headers={**names, **ask})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == page
        assert "DELETE" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        for path, status in (("/models", 200), ("/jobs/llmjob-no-one", 404)):
            answer = await front.client.get(path, headers=names)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, page)
        other = await front.client.get("/models", headers={**names, "Origin": "https://elsewhere.example"})
        assert other.status_code == 403


async def test_the_callers_credential_goes_to_the_gateway(stack: Stack, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    every, submits = keys.add(SCOPES), keys.add(["jobs:submit"])
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_API_KEYS_FILE": str(keys.path)})
    await gateway.start()
    await gateway.wait_ready()
    # The gateway asks for credentials, so the front may listen anywhere.
    own = {"HTTP_GATEWAY": stack.address(gateway.name), "HTTP_HOST": "0.0.0.0"}
    async with running_front(stack, **own) as front:
        for header, status, reason, challenge in (
            (None, 401, "CREDENTIAL_MISSING", "Bearer"),
            ("Bearer nonsense", 401, "CREDENTIAL_INVALID", 'Bearer error="invalid_token"'),
            ("Basic dTpw", 401, "CREDENTIAL_INVALID", 'Bearer error="invalid_token"'),
            (f"Bearer {submits}", 403, "MISSING_SCOPE", None),
            (f"Bearer {every}", 404, "JOB_NOT_FOUND", None),
        ):
            for path in ("/jobs/llmjob-no-one", "/jobs/llmjob-no-one/stream"):
                answer = await front.client.get(path, headers={"Authorization": header} if header else {})
                assert (answer.status_code, answer.json()["reason"]) == (status, reason)
                assert answer.headers.get("www-authenticate") == challenge
        twice = [("Authorization", f"Bearer {every}"), ("Authorization", f"Bearer {submits}")]
        assert (await front.client.get("/models", headers=twice)).status_code == 401
        # gRPC would refuse it as too large, as if a limit were reached.
        large = await front.client.get("/models", headers={"Authorization": f"Bearer {'x' * 20_000}"})
        assert (large.status_code, large.json()["reason"]) == (401, "CREDENTIAL_INVALID")
        assert (await front.client.get("/models", headers={"Authorization": f"Bearer {every}"})).status_code == 200
    await gateway.terminate()


async def test_nothing_is_answered_before_the_credential_is_judged(stack: Stack, tmp_path: Path) -> None:
    """Who may not call learns neither what is wrong with a request nor that a job is there, and sends no body."""
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.add(SCOPES)
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_API_KEYS_FILE": str(keys.path)})
    await gateway.start()
    await gateway.wait_ready()
    requests: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("GET", "/jobs/x/stream?last_event_id=end", {}),
        ("GET", "/jobs?no_parameter=1", {}),
        ("POST", "/jobs", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
        ("POST", "/jobs", {"json": {"surprise": 1}}),
        ("POST", "/jobs", {"content": b"x", "headers": {"Content-Type": "text/plain"}}),
        ("POST", "/v1/responses", {"json": {"input": []}}),
        ("GET", "/v1/responses/nothing", {}),
        ("GET", "/v1/responses/nothing/input_items?limit=0", {}),
    )
    async with running_front(stack, HTTP_GATEWAY=stack.address(gateway.name)) as front:
        for method, path, request in requests:
            for credential in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Bearer {key}"}):
                more = {**request, "headers": {**request.get("headers", {}), **credential}}
                status = (await front.client.request(method, path, **more)).status_code
                known = credential.get("Authorization", "").endswith(key)
                assert (path, credential, (status == 401) is not known) == (path, credential, True), status
                assert status < 500
        head = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 4000000\r\n\r\n{"
        async with asyncio.timeout(60), raw(front.address, head) as (reader, _):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
    await gateway.terminate()


async def test_the_fronts_own_certificate_speaks_for_nobody(stack: Stack, tmp_path: Path) -> None:
    """A caller without a credential is not taken for the front."""
    keys, ca = KeyFile(tmp_path / "keys.json"), Authority(tmp_path)
    key = keys.add(SCOPES)
    own = ca.issue_spiffe("front", "spiffe://llm.test/front")
    rules = [{"pattern": "spiffe://llm.test/front", "scopes": ["proxy"]}]
    gateway = stack.add(
        "gateway",
        {
            "GATEWAY_ROLE": "api",
            "GATEWAY_API_KEYS_FILE": str(keys.path),
            "GATEWAY_CLIENT_CERTIFICATES": json.dumps(rules),
            **ca.issue("gateway").environment("GATEWAY_TLS_", ca),
        },
    )
    await gateway.start()
    await gateway.wait_ready()
    tls = {"HTTP_GATEWAY_TLS_CA": str(ca.path), **own.environment("HTTP_GATEWAY_TLS_")}
    async with running_front(stack, HTTP_GATEWAY=stack.address(gateway.name), **tls) as front:
        assert (await front.client.get("/models")).status_code == 401
        assert (await front.client.get("/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200
    await gateway.terminate()


async def test_a_stream_whose_credential_is_revoked_ends_with_the_reason(stack: Stack, tmp_path: Path) -> None:
    """That of a job, and those of OpenAI's API, whose clients raise what they are sent."""
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.add(SCOPES)
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_API_KEYS_FILE": str(keys.path)})
    await gateway.start()
    await gateway.wait_ready()
    async with (
        running_front(stack, HTTP_GATEWAY=stack.address(gateway.name)) as front,
        contextlib.AsyncExitStack() as opened,
    ):
        front.client.headers["Authorization"] = f"Bearer {key}"
        job = {"user_id": "u", "request_id": "revoked", "model": "docstrings", "prompt": "x"}
        answer = await front.client.post("/jobs", json={**job, "params": {"max_tokens": 8000}})
        events = stream_of(front.client, answer.json()["workflow_id"])
        held = await until_text(events)
        of_openai = []
        for path, asked in (
            ("/v1/completions", {"prompt": "x", "max_tokens": 8000}),
            ("/v1/responses", {"input": "x", "max_output_tokens": 8000}),
        ):
            body = {"model": "docstrings", "stream": True, **asked}
            of_openai.append(events_of(await opened.enter_async_context(front.client.stream("POST", path, json=body))))
            await anext(of_openai[-1])
        keys.revoke(key)
        held += [event async for event in events]
        completion, response = [[event async for event in stream][-1] for stream in of_openai]
    assert (held[-1].name, held[-1].json["status"]) == ("problem", 401)
    assert completion.json["error"]["code"] == "credential_invalid"
    assert (response.name, response.json["code"]) == ("error", "credential_invalid")
    await gateway.terminate()


async def test_it_listens_for_everybody_only_where_callers_are_known(stack: Stack) -> None:
    process = stack.add("http", {"HTTP_HOST": "0.0.0.0"})
    await process.start()
    assert await process.wait() == 1
    assert "HTTP_ALLOW_ANONYMOUS" in process.log
    async with running_front(stack, HTTP_HOST="0.0.0.0", HTTP_ALLOW_ANONYMOUS="true") as front:
        assert (await front.client.get("/models")).status_code == 200


async def test_it_serves_tls_and_takes_a_new_certificate(stack: Stack, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    pair = ca.issue("front")
    trust = ssl.create_default_context(cafile=str(ca.path))
    async with running_front(stack, scheme="https", verify=trust, **pair.environment("HTTP_TLS_")) as front:
        assert (await front.client.get("/models")).status_code == 200
        other = Authority(tmp_path, "other")
        other.issue("front")
        renewed = ssl.create_default_context(cafile=str(other.path))
        async with httpx.AsyncClient(verify=renewed, trust_env=False) as client:
            assert (await client.get(f"https://{front.address}/models")).status_code == 200


# What can be seen


async def test_a_request_and_the_call_behind_it_are_one_trace(stack: Stack) -> None:
    caller = Caller()
    async with Collector() as collector:
        gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", **collector.environment})
        await gateway.start()
        await gateway.wait_ready()
        own = {"HTTP_GATEWAY": stack.address(gateway.name), **collector.environment}
        async with running_front(stack, **own) as front:
            answer = await front.client.get("/jobs/llmjob-no-one/status", headers=dict(caller.metadata))
            assert answer.status_code == 404
        await gateway.terminate()

    def words(span: Span) -> str:
        return f" by {span.service}"

    assert collector.spans.tree(caller, words) == [
        "GET /jobs/{id}/status by http",
        "  llm.v1.LlmService/GetStatus by http",
        "    llm.v1.LlmService/GetStatus by gateway",
    ]


async def test_requests_are_measured_by_route(stack: Stack) -> None:
    """No caller can add a label value."""
    async with running_front(stack) as front:
        for method, path in (
            ("GET", "/models"),
            ("POST", "/jobs"),
            ("GET", "/jobs/llmjob-no-one"),
            ("GET", "/made-up"),
            ("PROPFIND", "/jobs"),
        ):
            await front.client.request(method, path)
        found = Scrape([await get(front.metrics_url)])
    labels = ("http_request_method", "http_route", "http_response_status_code")
    assert found.by("http_server_request_duration_seconds_count", *labels) == {
        ("GET", "/models", "200"): 1,
        ("POST", "/jobs", "415"): 1,
        ("GET", "/jobs/{id}", "404"): 1,
        ("GET", "", "404"): 1,
        ("_OTHER", "/jobs", "405"): 1,
    }
    assert found.by("llm_http_streams") == {(): 0}


async def test_a_port_that_is_taken_is_an_error_that_says_so(stack: Stack) -> None:
    process = stack.add("http", {"HTTP_PORT": stack.address("http").rpartition(":")[2]})
    await process.start()
    assert await process.wait() == 1
    assert "HTTP_PORT choose another" in process.log
