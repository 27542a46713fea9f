"""Who may read the metrics of real processes: an API key with a scope, where a setting says so. Health stays open."""

import asyncio
from pathlib import Path

import aiohttp
import pytest

from deploy.local.stack import Stack
from runtime.scopes import SCOPES
from tests.support.credentials import KeyFile
from tests.support.scrapes import SERVICES, Scrape

PATIENCE = 120


async def ask(url: str, credential: str | None = None, method: str = "GET") -> tuple[int, str, str]:
    """Return status, challenge and body."""
    headers = {"Authorization": credential} if credential is not None else {}
    async with aiohttp.ClientSession() as session, session.request(method, url, headers=headers) as answer:
        return answer.status, answer.headers.get("WWW-Authenticate", ""), await answer.text()


@pytest.mark.parametrize("kind", SERVICES)
async def test_metrics_need_a_key_where_a_file_is_named(stack: Stack, tmp_path: Path, kind: str) -> None:
    """Probes of a container have no credential. A key counts from the next scrape on, and no longer once revoked."""
    keys = KeyFile(tmp_path / "keys.json")
    prometheus = keys.add(["admin:metrics"])
    process = stack.add(kind, {f"{kind.upper().replace('-', '_')}_METRICS_API_KEYS_FILE": str(keys.path)})
    await process.start()
    await process.wait_ready()
    url = stack.metrics_url(process.name)
    status, challenge, body = await ask(url)
    assert (status, challenge) == (401, "Bearer")
    assert "process_" not in body
    for wrong in ("Bearer x", f"Bearer {prometheus[:-1]}", f"Basic {prometheus}", "Bearer ", f"Bearer {prometheus}, x"):
        status, challenge, body = await ask(url, wrong)
        assert (status, challenge) == (401, 'Bearer error="invalid_token"'), wrong
        assert prometheus not in body
    status, challenge, body = await ask(url, f"Bearer {keys.add(SCOPES - {'admin:metrics', 'admin:*'})}")
    assert (status, challenge) == (403, "")
    assert "admin:metrics" in body
    assert (await ask(url, method="HEAD"))[0] == 401
    for good in (prometheus, keys.add(["admin:*"])):
        status, _, body = await ask(url, f"bearer {good}")
        assert status == 200
        assert "process_resident_memory_bytes" in {family.name for family in Scrape([body]).families}
    keys.revoke(prometheus)
    assert (await ask(url, f"Bearer {prometheus}"))[0] == 401
    for path in ("/healthz", "/readyz"):
        assert (await ask(url.replace("/metrics", path)))[0] == 200
    assert "Traceback" not in process.log
    assert prometheus not in process.log
    await process.terminate()


async def test_a_file_that_is_not_there_ends_the_process_and_not_the_check(stack: Stack) -> None:
    process = stack.add("codec", {"CODEC_METRICS_API_KEYS_FILE": "/nowhere/keys.json"})
    await process.start()
    async with asyncio.timeout(PATIENCE):
        assert await process.wait() == 1
    assert "CODEC_METRICS_API_KEYS_FILE: " in process.log
    assert "/nowhere/keys.json cannot be read" in process.log
    assert "Traceback" not in process.log


@pytest.mark.parametrize("kind", SERVICES)
async def test_metrics_that_everybody_could_read_end_the_process_unless_a_setting_says_so(
    stack: Stack, kind: str
) -> None:
    prefix = f"{kind.upper().replace('-', '_')}_METRICS_"
    process = stack.add(kind, {f"{prefix}HOST": "0.0.0.0"})
    await process.start()
    async with asyncio.timeout(PATIENCE):
        assert await process.wait() == 1
    for setting in ("HOST", "API_KEYS_FILE", "TLS_CLIENT_CA", "ALLOW_ANONYMOUS=true"):
        assert f"{prefix}{setting}" in process.log
    assert "Traceback" not in process.log


async def test_an_operator_may_let_everybody_read_metrics(stack: Stack, tmp_path: Path) -> None:
    """Or asks for a key; probes reach the health of both."""
    for more in ({"ALLOW_ANONYMOUS": "true"}, {"API_KEYS_FILE": str(KeyFile(tmp_path / "keys.json").path)}):
        settings = {"HOST": "0.0.0.0", **more}
        process = stack.add("codec", {f"CODEC_METRICS_{name}": value for name, value in settings.items()})
        await process.start()
        await process.wait_ready()
        url = stack.metrics_url(process.name)
        assert (await ask(url))[0] == (200 if "ALLOW_ANONYMOUS" in more else 401)
        assert (await ask(url.replace("/metrics", "/healthz")))[0] == 200
        await process.terminate()
