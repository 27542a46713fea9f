"""Who may have the codec server decrypt, and what: the real process, over HTTP and behind the Temporal CLI."""

import asyncio
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from google.protobuf import json_format
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from jobs.ids import tenant_of
from llm_pb import llm_pb2
from payload_converter import data_converter
from payload_converter.encryption import EncryptingCodec, encrypted_for, encrypting
from runtime.scopes import SCOPES
from tests.support import payload_converter_workflow as flow
from tests.support.certificates import Authority
from tests.support.credentials import AUDIENCE, ISSUER, Issuer, KeyFile, id_of
from tests.support.encryption import Keys
from tests.support.paths import ROOT
from tests.support.stacks import temporal_cli

PATIENCE = 120
UI = "http://localhost:8233"
TENANTS = ("acme", "globex", "")
OPERATOR = ("admin:codec",)
EVERYWHERE = ("admin:codec", "admin:tenants")


@dataclass
class Server:
    """A running codec server."""

    process: asyncio.subprocess.Process
    url: str
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def audit(self) -> list[dict[str, Any]]:
        """The fields of the audit log's lines."""
        common = {"time", "level", "logger", "message"}
        return [
            {name: value for name, value in line.items() if name not in common}
            for line in self.log
            if line["message"] == "audit"
        ]


@asynccontextmanager
async def running(environment: Mapping[str, str], url: str = "") -> AsyncIterator[Server]:
    """Run `python -m services.codec` while the context is open. Its log is whole once it has closed.

    `url` is for a server that does not log its own.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.codec"),
        cwd=ROOT,
        env={**os.environ, "CODEC_PORT": "0", "CODEC_METRICS_PORT": "0", **environment},
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    server = Server(process, url)
    try:
        async with asyncio.timeout(PATIENCE):
            while url and not await is_listening(url):  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.1)
            while not server.url:
                line = json.loads(await process.stderr.readline())
                server.log.append(line)
                if line["logger"] == "services.codec.server":
                    (server.url,) = re.findall(r"https?://\S+", line["message"])
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
        rest = (await process.communicate())[1].decode()
        server.log += [json.loads(line) for line in rest.splitlines()]


async def is_listening(url: str) -> bool:
    host, port = url.split("/")[2].split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def post(
    url: str, payloads: Payloads, credential: str | None = None, **options: Any
) -> tuple[int, Any, Mapping[str, str]]:
    """Return status, payloads or text, and headers. `credential` is what follows Bearer."""
    headers = {"Authorization": f"Bearer {credential}"} if credential else {}
    headers |= options.pop("headers", {})
    body = json_format.MessageToJson(payloads)
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers, **options) as answer:
        text = await answer.text()
        return answer.status, json_format.Parse(text, Payloads()) if answer.ok else text, answer.headers


def texts(payloads: Payloads) -> list[Any]:
    return [json.loads(payload.data) for payload in payloads.payloads]


def messages(*prompts: str) -> list[Payload]:
    return data_converter.payload_converter.to_payloads([llm_pb2.JobRequest(prompt=prompt) for prompt in prompts])


@dataclass
class Installation:
    """Keys of encryption for three tenants, and an operator's API key for each."""

    keys: Keys
    file: KeyFile
    of: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return {**self.keys.environment, "CODEC_API_KEYS_FILE": str(self.file.path)}

    async def page(self) -> Payloads:
        """Return a payload of each tenant, and one in clear."""
        found = messages("in clear")
        for tenant in TENANTS:
            found += await EncryptingCodec(self.keys.encryption(), tenant).encode(messages(f"of {tenant or 'nobody'}"))
        return Payloads(payloads=found)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    file = KeyFile(tmp_path / "keys.json")
    return Installation(Keys(tmp_path), file, {tenant: file.add(OPERATOR, tenant=tenant) for tenant in TENANTS})


CLEAR = {"prompt": "in clear"}
PLACEHOLDERS = {
    "acme": {"message": "encrypted for tenant 'acme', whose payloads this credential does not decrypt"},
    "globex": {"message": "encrypted for tenant 'globex', whose payloads this credential does not decrypt"},
    "": {"message": "encrypted without a tenant, which this credential does not decrypt"},
}
CONTENT = {tenant: {"prompt": f"of {tenant or 'nobody'}"} for tenant in TENANTS}


async def test_an_operator_sees_the_payloads_of_one_tenant_and_that_there_are_others(
    installation: Installation,
) -> None:
    """A page stays whole. Whose payloads were decrypted, and how many, is in the log without what is in them."""
    page = await installation.page()
    everywhere = installation.file.add(EVERYWHERE)
    async with running(installation.environment) as server:
        for tenant, key in installation.of.items():
            _, shown, _ = await post(f"{server.url}/decode", page, key)
            assert texts(shown) == [
                CLEAR,
                *(CONTENT[other] if other == tenant else PLACEHOLDERS[other] for other in TENANTS),
            ]
        _, shown, _ = await post(f"{server.url}/decode", page, everywhere)
        assert texts(shown) == [CLEAR, *CONTENT.values()]
        _, shown, _ = await post(f"{server.url}/tenants/globex/decode", page, everywhere)
        assert texts(shown) == [CLEAR, PLACEHOLDERS["acme"], CONTENT["globex"], PLACEHOLDERS[""]]
        foreign = Payloads(payloads=page.payloads[1:2])
        _, shown, _ = await post(f"{server.url}/decode", foreign, installation.of["globex"])
        assert texts(shown) == [PLACEHOLDERS["acme"]]
        await post(f"{server.url}/decode", Payloads(payloads=page.payloads[:1]), everywhere)
    who = {tenant: named(key, tenant) for tenant, key in installation.of.items()}
    assert server.audit == [
        *({"decision": "allowed", **who[one], "decrypted": {one: 1}, "withheld": 2} for one in TENANTS),
        {"decision": "allowed", **named(everywhere), "decrypted": dict.fromkeys(TENANTS, 1)},
        {"decision": "allowed", **named(everywhere), "decrypted": {"globex": 1}, "withheld": 2},
        {"decision": "refused", **who["globex"], "withheld": 1},
    ]
    assert "of acme" not in str(server.log)


def named(key: str, tenant: str = "") -> dict[str, str]:
    """Return who the audit log says has called with a key."""
    about = {"tenant": tenant, "subject": f"llmk_{id_of(key)}", "key_id": id_of(key)}
    return {name: value for name, value in about.items() if value}


async def test_what_is_typed_is_encrypted_for_the_tenant_of_the_operator(installation: Installation) -> None:
    """An operator of all tenants names one in the path, which both the Web UI and the CLI can send."""
    everywhere = installation.file.add(EVERYWHERE)
    acme = installation.of["acme"]
    sent = Payloads(payloads=messages("typed"))
    async with running(installation.environment) as server:
        for path, key, tenant in (
            ("", acme, "acme"),
            ("/tenants/acme", acme, "acme"),
            ("", installation.of[""], ""),
            ("", everywhere, ""),
            ("/tenants/globex", everywhere, "globex"),
        ):
            _, encoded, _ = await post(f"{server.url}{path}/encode", sent, key)
            assert [encrypted_for(payload) for payload in encoded.payloads] == [tenant]
            assert await EncryptingCodec(installation.keys.encryption(), tenant).decode(encoded.payloads) == [
                *sent.payloads
            ]
        status, text, _ = await post(f"{server.url}/tenants/globex/encode", sent, acme)
        assert (status, "admin:tenants" in text) == (403, True)
        status, text, _ = await post(f"{server.url}/tenants/globex/decode", await installation.page(), acme)
        assert (status, "of " in text) == (403, False)
        assert (await post(f"{server.url}/tenants/-/encode", sent, everywhere))[0] == 404
    assert [(line["decision"], line.get("encrypted")) for line in server.audit] == [
        ("allowed", {"acme": 1}),
        ("allowed", {"acme": 1}),
        ("allowed", {"": 1}),
        ("allowed", {"": 1}),
        ("allowed", {"globex": 1}),
        ("refused", None),
        ("refused", None),
    ]


async def test_a_caller_without_an_operators_credential_decrypts_nothing(installation: Installation) -> None:
    """Whatever it asks for. The Web UI's page can read why, and its preflight needs no credential."""
    page, file = await installation.page(), installation.file
    weak = file.add(SCOPES - {"admin:codec", "admin:*"}, tenant="acme")
    bound = file.add(OPERATOR, tenant="acme", user_id="alice")
    async with running(installation.environment) as server:
        for path in ("decode", "encode", "tenants/acme/decode", "nowhere"):
            for wrong, challenge in ((None, "Bearer"), ("llmk_a_b", 'Bearer error="invalid_token"')):
                status, text, headers = await post(f"{server.url}/{path}", page, wrong, headers={"Origin": UI})
                assert (status, headers["WWW-Authenticate"]) == (401, challenge)
                assert headers["Access-Control-Allow-Origin"] == UI
                assert "API key" in text or "revoked" in text
        for key, why in ((weak, "admin:codec"), (bound, "bound to a user")):
            status, text, headers = await post(f"{server.url}/decode", page, key)
            assert (status, why in text, "WWW-Authenticate" in headers) == (403, True, False)
        async with aiohttp.ClientSession() as session:
            ask = {"Origin": UI, "Access-Control-Request-Method": "POST"}
            for path in ("decode", "tenants/acme/decode"):
                async with session.options(f"{server.url}/{path}", headers=ask) as answer:
                    assert answer.status == 204
        acme = installation.of["acme"]
        ui = {"X-Namespace": "default", "Authorization-Extras": "an ID token"}
        assert (await post(f"{server.url}/decode", page, acme, headers=ui))[0] == 200
        file.revoke(acme)
        async with asyncio.timeout(PATIENCE):
            while (await post(f"{server.url}/decode", page, acme))[0] != 401:  # noqa: ASYNC110  nothing notifies
                await asyncio.sleep(0.1)
    lines = [line for line in server.audit if line["decision"] == "refused"]
    assert {
        "decision": "refused",
        "method": "decode",
        "code": "UNAUTHENTICATED",
        "reason": "CREDENTIAL_MISSING",
    } in lines
    assert {
        "decision": "refused",
        **named(weak, "acme"),
        "method": "decode",
        "code": "PERMISSION_DENIED",
        "reason": "MISSING_SCOPE",
    } in lines
    assert not [line for line in server.log if line["level"] == "ERROR"]
    assert acme not in str(server.log)


async def test_tokens_and_client_certificates_count_as_at_the_gateway(
    installation: Installation, tmp_path: Path
) -> None:
    """The Web UI passes on the token with which its user has signed in."""
    page, issuer, ca = await installation.page(), Issuer("one"), Authority(tmp_path)
    (tmp_path / "jwks.json").write_bytes(issuer.key_set())
    rule = {"pattern": "spiffe://test/ops/(?P<tenant>[a-z]+)", "scopes": OPERATOR}
    environment = {
        **installation.keys.environment,
        **ca.issue("codec").environment("CODEC_TLS_", ca),
        "CODEC_JWT_ISSUER": ISSUER,
        "CODEC_JWT_AUDIENCE": AUDIENCE,
        "CODEC_JWT_KEYS": str(tmp_path / "jwks.json"),
        "CODEC_JWT_TENANT_CLAIM": "org",
        "CODEC_CLIENT_CERTIFICATES": json.dumps([rule]),
    }
    context = ssl.create_default_context(cafile=ca.path)
    pair = ca.issue_spiffe("operator", "spiffe://test/ops/globex")
    context.load_cert_chain(pair.cert, pair.key)
    async with running(environment) as server:
        _, shown, _ = await post(f"{server.url}/decode", page, ssl=context)
        assert texts(shown)[1:3] == [PLACEHOLDERS["acme"], CONTENT["globex"]]
        token = issuer.token("one", OPERATOR, org="acme")
        _, shown, _ = await post(f"{server.url}/decode", page, token, ssl=context)
        assert texts(shown)[1:3] == [CONTENT["acme"], PLACEHOLDERS["globex"]]
        for bad in (issuer.token("one", OPERATOR), issuer.token("one", OPERATOR, org="acme", ends_in=-3600)):
            assert (await post(f"{server.url}/decode", page, bad, ssl=context))[0] == 401
        assert (await post(f"{server.url}/decode", page, issuer.token("one", (), org="acme"), ssl=context))[0] == 403
    assert [line.get("subject") for line in server.audit[:2]] == ["spiffe://test/ops/globex", "somebody"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"CODEC_HOST": "0.0.0.0"},
            ["CODEC_API_KEYS_FILE", "CODEC_JWT_ISSUER", "CODEC_CLIENT_CERTIFICATES", "CODEC_ALLOW_ANONYMOUS=true"],
        ),
        ({"CODEC_API_KEYS_FILE": "/nowhere/keys.json"}, ["CODEC_API_KEYS_FILE: ", "/nowhere/keys.json cannot be"]),
        ({"CODEC_JWT_ISSUER": ISSUER}, ["CODEC_JWT_AUDIENCE and CODEC_JWT_KEYS"]),
        (
            {"CODEC_CLIENT_CERTIFICATES": '[{"pattern": "spiffe://a/b", "scopes": ["admin:codec"]}]'},
            ["CODEC_CLIENT_CERTIFICATES needs CODEC_TLS_CLIENT_CA"],
        ),
    ],
)
async def test_a_server_that_would_decrypt_for_anybody_does_not_start(
    environment: dict[str, str], says: list[str]
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.codec"),
        cwd=ROOT,
        env={**os.environ, "CODEC_PORT": "0", "CODEC_METRICS_PORT": "0", **environment},
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            _, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1
    for words in says:
        assert words in log.decode()


async def test_an_operator_may_let_in_anybody_behind_a_proxy(installation: Installation) -> None:
    environment = {**installation.keys.environment, "CODEC_HOST": "0.0.0.0", "CODEC_ALLOW_ANONYMOUS": "true"}
    async with running(environment) as server:
        _, shown, _ = await post(f"{server.url}/decode", await installation.page())
    assert texts(shown) == [CLEAR, *CONTENT.values()]
    assert server.audit == [{"decision": "allowed", "decrypted": dict.fromkeys(TENANTS, 1)}]


async def test_the_cli_shows_the_jobs_of_the_operators_tenant(installation: Installation, stack: Stack) -> None:
    """And of another tenant's, that they are of another tenant: the failure's message, too."""
    encryption = installation.keys.encryption()
    converter = encrypting(type(encryption)(encryption.keys, tenant_of=tenant_of))
    client = await Client.connect(stack.address("temporal"), data_converter=converter)
    id_ = "llmjob--acme-alice-codec"
    async with Worker(client, task_queue=flow.TASK_QUEUE, workflows=[flow.Convert], activities=[failing]):
        job = llm_pb2.JobRequest(prompt="a secret prompt")
        with pytest.raises(WorkflowFailureError):
            await client.execute_workflow(flow.Convert.run, job, id=id_, task_queue=flow.TASK_QUEUE)
    async with running(installation.environment) as server:
        look = ("workflow", "show", "--detailed", "--workflow-id", id_, "--codec-endpoint")
        own = ("--codec-auth", f"Bearer {installation.of['acme']}")
        shown = await temporal_cli(stack, *look, server.url, *own)
        assert "input[0].prompt: a secret prompt" in shown
        assert "failure.cause.encodedAttributes.message: a secret error" in shown
        assert shown == await temporal_cli(stack, *look, f"{server.url}/tenants/acme", *own)
        shown = await temporal_cli(
            *(stack, *look, server.url, "--codec-auth", f"Bearer {installation.of['globex']}"),
        )
        assert "secret" not in shown
        assert f"input[0].message: {PLACEHOLDERS['acme']['message']}" in shown
        assert f"failure.encodedAttributes.message: {PLACEHOLDERS['acme']['message']}" in shown


@flow.activity.defn(name="Generate")
async def failing(_job: llm_pb2.JobRequest) -> None:
    raise ApplicationError("a secret error", non_retryable=True)


async def test_an_audit_file_has_each_record_whatever_is_logged(installation: Installation, tmp_path: Path) -> None:
    """Before the answer. Nothing is shown that cannot be recorded."""
    page, path = await installation.page(), tmp_path / "codec.jsonl"
    settings = {**installation.environment, "CODEC_AUDIT": str(path), "LOG_LEVEL": "WARNING"}
    for place in (str(path), "/dev/full"):
        # The address is logged at the level INFO, which is off.
        address = f"127.0.0.1:{free_port()}"
        url = f"http://{address}/decode"
        environment = {**settings, "CODEC_AUDIT": place, "CODEC_PORT": address.split(":")[1]}
        async with running(environment, url) as server:
            if place == str(path):
                status, answer, _ = await post(server.url, page, installation.of["acme"])
                assert (status, len(answer.payloads)) == (200, 4)
                (record,) = map(json.loads, path.read_text().splitlines())
                assert record.pop("time")
                assert record == {
                    "decision": "allowed",
                    "tenant": "acme",
                    "subject": f"llmk_{id_of(installation.of['acme'])}",
                    "key_id": id_of(installation.of["acme"]),
                    "decrypted": {"acme": 1},
                    "withheld": 2,
                }
                assert (await post(server.url, page))[0] == 401
                assert json.loads(path.read_text().splitlines()[1])["reason"] == "CREDENTIAL_MISSING"
            else:
                status, answer, _ = await post(server.url, page, installation.of["acme"])
                assert (status, "audit log" in answer) == (503, True)
                assert (await post(server.url, page))[0] == 401


async def test_a_credential_of_any_bytes_is_refused_and_recorded(installation: Installation) -> None:
    """HTTP servers decode what is no UTF-8 in a way that cannot be encoded again."""
    async with running(installation.environment) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for token in (b"llmk_\xff", b"\xff", b"\xc3\xa9.b.c"):
            reader, writer = await asyncio.open_connection(host, int(port))
            head = b"POST /decode HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + token
            writer.write(head + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            assert (await reader.readline()).split()[1] == b"401"
            writer.close()
            await writer.wait_closed()
    assert [line["reason"] for line in server.audit] == ["CREDENTIAL_INVALID"] * 3
    assert "Traceback" not in json.dumps(server.log)
