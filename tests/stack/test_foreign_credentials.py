"""Clients without this code base, and the Python client, with TLS and each kind of credential."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from durable_llm import AsyncClient
from durable_llm.errors import CredentialMissing
from tests.stack.test_polyglot import node_example
from tests.support.certificates import Authority, Pair, credentials
from tests.support.commands import run
from tests.support.credentials import AUDIENCE, ISSUER, Issuer, KeyFile
from tests.support.jobs import new_job
from tests.support.paths import ROOT
from tests.support.stacks import tool

SCOPES = ["jobs:submit"]
METHOD = "llm.v1.LlmService/Submit"


class Access(NamedTuple):
    """What a client needs to call."""

    address: str
    ca: Authority
    token: str = ""
    pair: Pair | None = None


async def by_grpcurl(access: Access, job: str) -> str:
    given = ["-cacert", str(access.ca.path)]
    given += ["-H", f"authorization: Bearer {access.token}"] if access.token else []
    given += ["-cert", str(access.pair.cert), "-key", str(access.pair.key)] if access.pair else []
    ended = await run(tool("grpcurl"), *given, "-d", f'{{"job": {job}}}', access.address, METHOD)
    return str(json.loads(ended.output)["workflowId"]) if ended.status == 0 else ended.errors


async def by_buf(access: Access, job: str) -> str:
    given = ["--protocol", "grpc", "--cacert", str(access.ca.path)]
    given += ["-H", f"authorization: Bearer {access.token}"] if access.token else []
    given += ["--cert", str(access.pair.cert), "--key", str(access.pair.key)] if access.pair else []
    ended = await run(tool("buf"), "curl", *given, "--data", f'{{"job": {job}}}', f"https://{access.address}/{METHOD}")
    return str(json.loads(ended.output)["workflowId"]) if ended.status == 0 else ended.errors


async def by_node(access: Access, job: str) -> str:
    environment = {"LLM_ADDRESS": access.address, "LLM_CA": str(access.ca.path)}
    environment |= {"LLM_CREDENTIAL": access.token} if access.token else {}
    environment |= {"LLM_CERT": str(access.pair.cert), "LLM_KEY": str(access.pair.key)} if access.pair else {}
    ended = await run(*await node_example("client.js"), "submit", job, cwd=ROOT, **environment)
    return ended.output.strip() if ended.status == 0 else ended.errors


async def by_python(access: Access, job: str) -> str:
    metadata = {"authorization": f"Bearer {access.token}"} if access.token else None
    tls = credentials(access.ca, access.pair)
    fields = json.loads(job)
    async with AsyncClient(access.address, credentials=tls, metadata=metadata) as client:
        try:
            return (await client.submit(new_job(**fields))).workflow_id
        except CredentialMissing as error:
            return f"UNAUTHENTICATED: {error}"


CLIENTS: dict[str, Callable[[Access, str], Awaitable[str]]] = {
    "grpcurl": by_grpcurl,
    "buf": by_buf,
    "node": by_node,
    "python": by_python,
}


@pytest.fixture(scope="module")
async def accesses(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Access]]:
    """A gateway with TLS and all kinds of credentials, and how to call it with each."""
    folder: Path = tmp_path_factory.mktemp("foreign")
    ca, keys, issuer, key_set = Authority(folder), KeyFile(folder / "keys.json"), Issuer("rsa"), folder / "jwks.json"
    key_set.write_bytes(issuer.key_set())
    mtls = free_port()
    settings = {
        **ca.issue("server").environment("GATEWAY_TLS_", ca),
        "GATEWAY_MTLS_PORT": str(mtls),
        "GATEWAY_REFLECTION": "true",
        "GATEWAY_API_KEYS_FILE": str(keys.path),
        "GATEWAY_JWT_ISSUER": ISSUER,
        "GATEWAY_JWT_AUDIENCE": AUDIENCE,
        "GATEWAY_JWT_KEYS": str(key_set),
        "GATEWAY_JWT_TENANT_CLAIM": "org",
        "GATEWAY_CLIENT_CERTIFICATES": json.dumps(
            [{"pattern": "spiffe://test/(?P<tenant>[a-z]+)/jobs", "scopes": SCOPES}]
        ),
    }
    key = keys.add(SCOPES, tenant="acme")
    process = stack.add("gateway", settings)
    await process.start()
    await process.wait_ready()
    address = stack.address(process.name)
    yield {
        "key": Access(address, ca, key),
        "token": Access(address, ca, issuer.token("rsa", SCOPES, org="acme")),
        "certificate": Access(f"127.0.0.1:{mtls}", ca, pair=ca.issue_spiffe("client", "spiffe://test/acme/jobs")),
        "none": Access(address, ca),
    }
    await process.terminate()


@pytest.mark.parametrize("kind", ["key", "token", "certificate", "none"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_each_client_calls_with_each_credential(accesses: dict[str, Access], client: str, kind: str) -> None:
    """The job is the credential's tenant's. Without a credential there is none."""
    job = json.dumps(
        {"user_id": client, "request_id": kind, "model": "idle", "prompt": "Hi.", "params": {"max_tokens": 5}}
    )
    answer = await CLIENTS[client](accesses[kind], job)
    if kind == "none":
        assert "unauthenticated" in answer.lower()
        assert "the call has no credential" in answer
    else:
        assert answer == f"llmjob--acme-{client}-{kind}"
