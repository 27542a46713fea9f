"""The recipe of deploy/envoy: a real Envoy in front of gateways with TLS that ask for credentials."""

import asyncio
import json
import re
import shutil
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import pytest

from deploy.local.process import Process
from deploy.local.stack import Stack
from durable_llm import AsyncClient
from durable_llm.errors import CredentialInvalid, CredentialMissing, InvalidRequest, LimitReached
from llm_pb import batch_pb2, file_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.batches import Stubs, create, lines_of
from tests.support.certificates import Authority, credentials
from tests.support.commands import missing, run
from tests.support.credentials import CallsAs, KeyFile, bearer
from tests.support.envoy import (
    ORIGIN,
    RECIPE,
    Envoy,
    connection_manager,
    envoy_program,
    http_filter,
    routes_of,
    running_envoy,
)
from tests.support.files import OpenUpload, content, download, new_file
from tests.support.jobs import details_of, new_job, until_output
from tests.support.paths import ROOT

SCOPES = ("jobs:submit", "jobs:read", "jobs:cancel", "models:read", "files:read", "files:write")
CONNECT_WEB = ROOT / "tests" / "clients" / "connect-web"
SERVICE = "/llm.v1.LlmService"
MIB = 1024 * 1024
PROTO = {"content-type": "application/proto", "connect-protocol-version": "1"}


class Gateways(NamedTuple):
    """Two gateways that take clients with certificates only, and three keys of a tenant."""

    ca: Authority
    keys: tuple[str, str, str]
    processes: tuple[Process, Process]
    addresses: tuple[str, str]


@pytest.fixture(scope="module")
async def gateways(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateways]:
    envoy_program()
    folder = tmp_path_factory.mktemp("gateways")
    ca, file = Authority(folder), KeyFile(folder / "keys.json")
    one_key, second, third = (file.add(SCOPES, tenant="acme") for _ in range(3))
    settings = {
        **ca.issue("gateway").environment("GATEWAY_TLS_", ca),
        # The stack's gateway runs the workflows, so that the death of one of these delays none.
        "GATEWAY_ROLE": "api",
        "GATEWAY_PAGE_TOKEN_KEY": "the same at each gateway",
        "GATEWAY_API_KEYS_FILE": str(file.path),
        "GATEWAY_CLIENT_CERTIFICATES": json.dumps([{"pattern": "spiffe://test/envoy", "scopes": ["proxy"]}]),
    }
    one, other = (stack.add("gateway", settings) for _ in range(2))
    async with AsyncExitStack() as exits:
        for process in (one, other):
            await process.start()
            exits.push_async_callback(process.terminate)
        for process in (one, other):
            await process.wait_ready()
        yield Gateways(ca, (one_key, second, third), (one, other), (stack.address(one.name), stack.address(other.name)))


@pytest.fixture(scope="module")
async def envoy(gateways: Gateways, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Envoy]:
    """The recipe as it stands, but for its addresses."""
    folder = tmp_path_factory.mktemp("envoy")
    async with running_envoy(folder / "run", gateways.ca, gateways.addresses) as envoy:
        yield envoy


@pytest.fixture(scope="module")
def key(gateways: Gateways) -> str:
    return gateways.keys[0]


def client_of(envoy: Envoy, key: str = "") -> AsyncClient:
    metadata = {"authorization": f"Bearer {key}"} if key else None
    return AsyncClient(envoy.address, credentials=credentials(envoy.tls), metadata=metadata)


def http_of(envoy: Envoy, key: str = "") -> httpx.AsyncClient:
    """Return a client for HTTP/1.1, as browsers' without HTTP/2."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    context = ssl.create_default_context(cafile=envoy.tls.path)
    return httpx.AsyncClient(
        base_url=f"https://{envoy.address}", verify=context, headers=headers, timeout=60, trust_env=False
    )


async def settled(stub: LlmServiceStub, id_: str) -> llm_pb2.GetStatusResponse:
    """Return how a job ended, from a gateway that no proxy is in front of."""
    async for _ in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=120):
        pass
    answer: llm_pb2.GetStatusResponse = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    return answer


@pytest.fixture
async def to_gateway(gateways: Gateways) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to one gateway, with the proxy's certificate."""
    certificate = gateways.ca.issue_spiffe("direct", "spiffe://test/envoy")
    async with grpc.aio.secure_channel(gateways.addresses[1], credentials(gateways.ca, certificate)) as channel:
        yield channel


@pytest.fixture
async def direct(to_gateway: grpc.aio.Channel, key: str) -> Any:
    """Calls the gateway as the tenant, with the key."""
    return CallsAs(LlmServiceStub(to_gateway), key)


async def test_the_recipe_is_valid_as_it_stands(tmp_path: Path) -> None:
    program, folder = envoy_program(), tmp_path / "envoy"
    shutil.copytree(RECIPE, folder)
    (folder / "tls").mkdir()
    ca = Authority(folder / "tls")
    ca.issue("server")
    ca.issue_spiffe("proxy", "spiffe://test/envoy")
    checked = await run(program, "--mode", "validate", "-c", "envoy.yaml", cwd=folder)
    assert checked.status == 0, checked.errors
    assert "Deprecated" not in checked.errors


async def test_a_grpc_client_submits_streams_resumes_and_cancels(envoy: Envoy, key: str, direct: Any) -> None:
    """The credential is the caller's own: the job is its tenant's."""
    async with client_of(envoy, key) as client:
        job = await client.submit(new_job(user_id="grpc", request_id="1", params={"max_tokens": 300}))
        assert job.workflow_id == "llmjob--acme-grpc-1"
        text, token = "", ""
        while not (text and token == ""):
            pieces = job.stream(token)
            token = ""
            async for piece in pieces:
                text += piece.text
                if len(text) % 5 == 0:
                    token = piece.resume_token
                    break
            await pieces.aclose()
        assert text == (await settled(direct, job.workflow_id)).result.output
        long = await client.submit(new_job(user_id="grpc", request_id="2", params={"max_tokens": 4000}))
        await until_output(direct, long.workflow_id)
        await long.cancel(reason="not needed")
        assert (await settled(direct, long.workflow_id)).status.state == llm_pb2.JOB_STATE_CANCELLED


async def test_the_proxys_certificate_is_no_credential(envoy: Envoy) -> None:
    """Who sends none is nobody, although Envoy's connection to the gateway has a certificate."""
    async with client_of(envoy) as client:
        with pytest.raises(CredentialMissing):
            await client.models()
    async with client_of(envoy, "llmk_wrong_wrong") as client:
        with pytest.raises(CredentialInvalid):
            await client.models()


async def test_errors_arrive_with_their_details(envoy: Envoy, key: str) -> None:
    async with client_of(envoy, key) as client:
        with pytest.raises(InvalidRequest) as error:
            await client.submit(new_job(priority=9))
    assert error.value.violations[0].field == "job.priority"


@pytest.mark.parametrize("protocol", ["grpc-web", "connect"])
async def test_a_page_submits_streams_resumes_and_cancels(
    envoy: Envoy, key: str, direct: Any, tmp_path: Path, protocol: str
) -> None:
    """With Connect's client for browsers, unmodified. Breaking a stream off ends its call."""
    command = await connect_web()
    descriptors = tmp_path / "llm.binpb"
    includes = [f"-I{ROOT / folder}" for folder in ("proto", "third_party/googleapis")]
    compiled = await run(
        sys.executable, "-m", "grpc_tools.protoc", *includes, "--include_imports", f"-o{descriptors}", "llm.proto"
    )
    assert compiled.status == 0, compiled.errors
    ended = await run(
        *command,
        PROTOCOL=protocol,
        BASE_URL=f"https://{envoy.address}",
        CREDENTIAL=key,
        DESCRIPTORS=str(descriptors),
        NODE_EXTRA_CA_CERTS=str(envoy.tls.path),
        NO_PROXY="127.0.0.1",
    )
    assert ended.status == 0, ended.errors
    told = json.loads(ended.output)
    assert told["id"] == f"llmjob--acme-page-{protocol}"
    assert told["output"] == (await settled(direct, told["id"])).result.output != ""
    assert told["resumes"] > 0
    assert (told["state"], told["cancelled"]) == ("JOB_STATE_SUCCEEDED", "JOB_STATE_CANCELLED")
    # 3 is invalid_argument.
    assert told["refused"] == {"code": 3, "details": details_named(protocol)}


def details_named(protocol: str) -> list[str]:
    """Return the types of an error's details as a client sees them. Envoy's bridge writes a URL, Connect a name."""
    prefix = "type.googleapis.com/" if protocol == "connect" else ""
    return [f"{prefix}google.rpc.{name}" for name in ("BadRequest", "ErrorInfo")]


async def connect_web() -> list[str]:
    """Return the command that runs Connect's client."""
    return [*await node_with(CONNECT_WEB), str(CONNECT_WEB / "check.js")]


async def node_with(folder: Path) -> list[str]:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        missing("Node.js with npm")
    if not (folder / "node_modules").exists():
        installed = await run(npm, "ci", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund")
        assert installed.status == 0, installed.errors
    return [node]


async def test_connect_without_a_library(envoy: Envoy, key: str, direct: Any) -> None:
    """A unary call is a POST of the protobuf message. A stream is framed by five bytes a message."""
    async with http_of(envoy, key) as http:
        job = new_job(user_id="curl", request_id="1", params={"max_tokens": 50})
        request = llm_pb2.SubmitRequest(job=job).SerializeToString()
        answer = await http.post(f"{SERVICE}/Submit", content=request, headers=PROTO)
        assert answer.status_code == httpx.codes.OK, answer.text
        id_ = llm_pb2.SubmitResponse.FromString(answer.content).workflow_id
        assert id_ == "llmjob--acme-curl-1"
        watched = llm_pb2.StreamStatusRequest(workflow_id=id_).SerializeToString()
        headers = {"content-type": "application/connect+proto", "connect-protocol-version": "1"}
        framed = b"\0" + len(watched).to_bytes(4, "big") + watched
        answer = await http.post(f"{SERVICE}/StreamStatus", content=framed, headers=headers)
        *messages, end = frames(answer.content)
        assert end == (2, b"{}")
        received = [llm_pb2.StreamStatusResponse.FromString(message) for _, message in messages]
        output = "".join(message.delta.text for message in received)
        assert output == (await settled(direct, id_)).result.output != ""
        job.priority = 9
        job.request_id = "2"
        refused = await http.post(
            f"{SERVICE}/Submit", content=llm_pb2.SubmitRequest(job=job).SerializeToString(), headers=PROTO
        )
        assert refused.status_code == httpx.codes.BAD_REQUEST
        assert refused.json()["code"] == "invalid_argument"
        assert sorted(detail["type"] for detail in refused.json()["details"]) == details_named("connect")


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Return flags and content of each message of Connect's framing."""
    found = []
    while data:
        size = int.from_bytes(data[1:5], "big")
        found.append((data[0], data[5 : 5 + size]))
        data = data[5 + size :]
    return found


@pytest.mark.parametrize("content_type", ["application/json", "application/connect+json"])
async def test_connect_in_json_is_refused(envoy: Envoy, key: str, content_type: str) -> None:
    async with http_of(envoy, key) as http:
        answer = await http.post(f"{SERVICE}/ListModels", content="{}", headers={"content-type": content_type})
    assert answer.status_code == httpx.codes.UNSUPPORTED_MEDIA_TYPE
    assert answer.json()["code"] == "unimplemented"


async def test_what_is_no_method_of_the_api_is_not_passed_on(envoy: Envoy) -> None:
    async with http_of(envoy) as http:
        assert (await http.get("/")).status_code == httpx.codes.NOT_FOUND
    async with grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel:
        method: Any = channel.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await method(b"", timeout=60)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_only_pages_of_the_named_origins_may_call(envoy: Envoy, key: str) -> None:
    """A browser asks first, and shows an answer only to an origin that it names."""
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-grpc-web",
    }
    call = {"content-type": "application/proto", "connect-protocol-version": "1"}
    async with http_of(envoy, key) as http:
        asked = await http.options(f"{SERVICE}/ListModels", headers={"origin": ORIGIN, **asks})
        assert asked.status_code == httpx.codes.OK
        assert asked.headers["access-control-allow-origin"] == ORIGIN
        assert {"authorization", "content-type", "x-grpc-web"} <= set(
            asked.headers["access-control-allow-headers"].split(",")
        )
        assert asked.headers["access-control-allow-methods"] == "POST"
        assert "access-control-allow-credentials" not in asked.headers
        answer = await http.post(f"{SERVICE}/ListModels", headers={"origin": ORIGIN, **call})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "grpc-status" in answer.headers["access-control-expose-headers"]
        for origin in ("https://evil.example.com", f"{ORIGIN}.evil.example", "null"):
            asked = await http.options(f"{SERVICE}/ListModels", headers={"origin": origin, **asks})
            assert "access-control-allow-origin" not in asked.headers
            answer = await http.post(f"{SERVICE}/ListModels", headers={"origin": origin, **call})
            assert "access-control-allow-origin" not in answer.headers


async def test_a_rate_limit_is_an_error_that_clients_understand(gateways: Gateways, tmp_path: Path) -> None:
    """Each credential has calls of its own. gRPC, gRPC-Web and Connect each get their own form of the error."""

    def few_calls(recipe: Any) -> None:
        (of_credential,) = (
            one
            for one in http_filter(recipe, "local_ratelimit")["descriptors"]
            if one["entries"][0]["key"] == "credential"
        )
        of_credential["token_bucket"] = {"max_tokens": 2, "tokens_per_fill": 1, "fill_interval": "3600s"}

    _, greedy, other = gateways.keys
    async with running_envoy(tmp_path / "run", gateways.ca, gateways.addresses, few_calls) as envoy:
        async with grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel:
            stub = LlmServiceStub(channel)
            for _ in range(2):
                await models_of(stub, greedy)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.ListModels(llm_pb2.ListModelsRequest(), metadata=bearer(greedy), timeout=60)
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            details = details_of(error.value)
            assert details["ErrorInfo"].reason == LimitReached.reason
            assert details["RetryInfo"].retry_delay.seconds == 1
            await models_of(stub, other)
        async with http_of(envoy, greedy) as http:
            limited = await http.post(f"{SERVICE}/ListModels", headers=PROTO)
            assert (limited.status_code, limited.json()["code"]) == (429, "resource_exhausted")
            assert limited.headers["retry-after"] == "1"
            web = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
            limited = await http.post(f"{SERVICE}/ListModels", content=b"\0\0\0\0\0", headers=web)
            assert limited.headers["grpc-status"] == "8", (limited.headers, limited.content)
            assert limited.headers["grpc-status-details-bin"]


async def models_of(stub: LlmServiceStub, key: str) -> None:
    await stub.ListModels(llm_pb2.ListModelsRequest(), metadata=bearer(key), timeout=60)


async def test_a_gateway_dies_and_the_others_go_on(envoy: Envoy, gateways: Gateways, key: str, direct: Any) -> None:
    """No call fails that begins afterwards. A watcher of the dead gateway continues at another."""
    dies = gateways.processes[0]
    async with (
        client_of(envoy, key) as client,
        grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel,
    ):
        jobs = [await client.submit(new_job(user_id="dies", params={"max_tokens": 600})) for _ in range(6)]
        watching = [asyncio.create_task(text_of(job)) for job in jobs]
        for job in jobs:
            await until_output(direct, job.workflow_id)
        await dies.kill()
        try:
            for _ in range(20):
                await models_of(LlmServiceStub(channel), key)
            for job, text in zip(jobs, await asyncio.gather(*watching), strict=True):
                assert text == (await settled(direct, job.workflow_id)).result.output
        finally:
            await dies.start()
            await dies.wait_ready()


async def text_of(job: Any) -> str:
    return "".join([piece.text async for piece in job.stream()])


async def test_envoy_dies_and_the_client_goes_on(envoy: Envoy, key: str, direct: Any) -> None:
    """It is started again, and the client holds the exact text."""
    async with client_of(envoy, key) as client:
        job = await client.submit(new_job(user_id="restart", params={"max_tokens": 600}))
        pieces = job.stream()
        text = (await anext(pieces)).text
        await envoy.process.kill()
        await envoy.process.start()
        text += "".join([piece.text async for piece in pieces])
    assert text == (await settled(direct, job.workflow_id)).result.output
    await envoy.process.wait_ready()


async def test_a_silent_stream_outlives_the_idle_timeout(gateways: Gateways, key: str, tmp_path: Path) -> None:
    """The gateway's keep-alive messages, each second here, are what keeps it."""

    def impatient(recipe: Any) -> None:
        connection_manager(recipe)["stream_idle_timeout"] = "4s"

    async with (
        running_envoy(tmp_path / "run", gateways.ca, gateways.addresses, impatient) as envoy,
        grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel,
    ):
        stub = CallsAs(LlmServiceStub(channel), key)
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
        count = 0
        async for _ in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=120):
            count += 1
            if count == 10:
                break
        assert count == 10
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


def silent_for_a_second(recipe: Any) -> None:
    connection_manager(recipe)["stream_idle_timeout"] = "1s"


async def test_files_of_any_size_pass_also_from_a_client_that_pauses(
    gateways: Gateways, key: str, tmp_path: Path
) -> None:
    """More bytes than a request of one message may have, and a pause for longer than another call may be silent."""
    sent = content(6 * MIB)
    async with (
        running_envoy(tmp_path / "run", gateways.ca, gateways.addresses, silent_for_a_second) as envoy,
        grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel,
    ):
        unbound: Any = FileServiceStub(channel)
        files = CallsAs(unbound, key)
        upload = OpenUpload(files)
        upload.send(**new_file(), data=sent[:MIB])
        await asyncio.sleep(3)
        for offset in range(MIB, 6 * MIB, MIB):
            upload.send(offset=offset, data=sent[offset : offset + MIB], last=offset == 5 * MIB)
        upload.end()
        file = (await upload.call).file
        assert file.state == file_pb2.FILE_STATE_READY
        assert await download(files, file.ref.file_id) == sent


async def test_a_batch_that_waits_keeps_its_streams(
    gateways: Gateways, key: str, to_gateway: grpc.aio.Channel, tmp_path: Path
) -> None:
    """No message comes for longer than another call may be silent."""
    behind = stubs_of(to_gateway, key)
    created = await create(behind, lines_of(1))
    async with (
        running_envoy(tmp_path / "run", gateways.ca, gateways.addresses, silent_for_a_second) as envoy,
        grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel,
    ):
        stubs = stubs_of(channel, key)
        request = batch_pb2.StreamBatchRequest(batch_id=created.batch_id)
        watched = asyncio.ensure_future(last_of(stubs.batches.StreamBatch(request, timeout=120)))
        results = asyncio.ensure_future(stubs.results(created.batch_id))
        ended, _ = await asyncio.wait({watched, results}, timeout=4, return_when=asyncio.FIRST_COMPLETED)
        assert not ended
        await behind.cancel(created.batch_id)
        assert (await watched).status.state == batch_pb2.BATCH_STATE_CANCELLED
        await results


def stubs_of(channel: grpc.aio.Channel, key: str) -> Stubs:
    files: Any = FileServiceStub(channel)
    batches: Any = BatchServiceStub(channel)
    return Stubs(CallsAs(files, key), CallsAs(batches, key))


async def last_of(stream: Any) -> Any:
    return [message async for message in stream][-1]


async def test_a_request_that_does_not_come_is_ended(gateways: Gateways, key: str, tmp_path: Path) -> None:
    """It would hold its call for ever: the route bounds the time of a call with its request."""

    def impatient(recipe: Any) -> None:
        for route in routes_of(recipe):
            if "max_stream_duration" in route:
                route["max_stream_duration"] = {"max_stream_duration": "2s"}

    ended = asyncio.Event()

    async def without_end() -> AsyncIterator[bytes]:
        yield b""
        await ended.wait()

    async with (
        running_envoy(tmp_path / "run", gateways.ca, gateways.addresses, impatient) as envoy,
        grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel,
    ):
        method: Any = channel.stream_unary(f"{SERVICE}/Submit")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await method(without_end(), metadata=bearer(key), timeout=60)
        ended.set()
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "duration timeout" in (error.value.details() or "")


async def test_a_drain_lets_streams_end(gateways: Gateways, key: str, direct: Any, tmp_path: Path) -> None:
    """A load balancer sees it at /healthz; what runs goes on to its end."""
    async with (
        running_envoy(tmp_path / "run", gateways.ca, gateways.addresses) as envoy,
        http_of(envoy) as http,
        httpx.AsyncClient(trust_env=False) as admin,
        grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel,
    ):
        assert (await http.get("/healthz")).status_code == httpx.codes.OK
        stub = CallsAs(LlmServiceStub(channel), key)
        job = new_job(user_id="drain", params={"max_tokens": 1000})
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
        stream = stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=120)
        messages = aiter(stream)
        text = (await anext(messages)).delta.text
        assert (await admin.post(f"{envoy.admin}/healthcheck/fail")).status_code == httpx.codes.OK
        assert (await http.get("/healthz")).status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert (await admin.post(f"{envoy.admin}/drain_listeners?graceful")).status_code == httpx.codes.OK
        text += "".join([message.delta.text async for message in messages])
        assert text == (await settled(direct, id_)).result.output


@pytest.mark.parametrize("protocol", ["http/1.1", "grpc"])
@pytest.mark.parametrize("bomb", [{"x-large": "a" * 60_000}, {f"x-{n}": "a" for n in range(300)}], ids=["long", "many"])
async def test_a_header_bomb_reaches_no_gateway(envoy: Envoy, key: str, protocol: str, bomb: dict[str, str]) -> None:
    """It is refused, and Envoy serves the next call."""
    if protocol == "grpc":
        async with grpc.aio.secure_channel(envoy.address, credentials(envoy.tls)) as channel:
            call = LlmServiceStub(channel).ListModels(
                llm_pb2.ListModelsRequest(), metadata=(*bearer(key), *bomb.items()), timeout=60
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await call
    else:
        async with http_of(envoy, key) as http:
            refused = await http.post(f"{SERVICE}/ListModels", headers={**PROTO, **bomb})
            assert refused.status_code == httpx.codes.REQUEST_HEADER_FIELDS_TOO_LARGE
    async with client_of(envoy, key) as client:
        assert await client.models()


async def test_a_request_that_is_too_large_reaches_no_gateway(envoy: Envoy, key: str) -> None:
    async with http_of(envoy, key) as http:
        refused = await http.post(f"{SERVICE}/Submit", content=b"\0" * (5 * 1024 * 1024), headers=PROTO)
    assert refused.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE


async def test_a_new_certificate_is_used_without_a_restart(gateways: Gateways, tmp_path: Path) -> None:
    """A client that trusts only the new CA can call once the files are replaced."""
    newer = Authority(tmp_path, "newer")
    pair = newer.issue("server")
    context = ssl.create_default_context(cafile=newer.path)
    async with running_envoy(tmp_path / "run", gateways.ca, gateways.addresses) as envoy, asyncio.timeout(60):
        for file in (pair.cert, pair.key):
            file.rename(envoy.tls.folder / file.name)
        while True:
            try:
                async with httpx.AsyncClient(verify=context, trust_env=False) as http:
                    assert (await http.get(f"https://{envoy.address}/healthz")).status_code == httpx.codes.OK
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.1)


async def test_no_log_holds_a_credential(envoy: Envoy, key: str) -> None:
    async with http_of(envoy, key) as http:
        await http.post(f"{SERVICE}/ListModels?message=a-private-prompt", headers=PROTO)
    async with asyncio.timeout(60):
        while not (lines := re.findall(r'^\{.*"path":"/llm.v1.LlmService/ListModels".*$', envoy.process.log, re.M)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert json.loads(lines[-1])["client"] == "127.0.0.1"
    logged = envoy.process.log_path.read_text()
    assert key not in logged
    assert "a-private-prompt" not in logged
