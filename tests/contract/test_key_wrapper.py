"""The contract of key wrappers, kept by the file and by KMS."""

import asyncio
import json
import re
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from encryption import KeysUnavailable
from encryption.key_wrapper import KeyWrapper
from encryption.keyring import Keyring
from tests.support.commands import start


async def new_key(url: str) -> str:
    headers = {
        "Content-Type": "application/x-amz-json-1.1",
        "X-Amz-Target": "TrentService.CreateKey",
        # By which moto finds the service; it checks no signature.
        "Authorization": "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/kms/aws4_request",
    }
    async with aiohttp.ClientSession() as http, http.post(url, data="{}", headers=headers) as response:
        arn: str = json.loads(await response.text())["KeyMetadata"]["Arn"]
        return arn


@pytest.fixture(scope="module")
async def moto() -> AsyncIterator[str]:
    """The URL of a server with KMS."""
    pytest.importorskip("moto.server")
    server = await start(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0")
    assert server.stderr
    try:
        async with asyncio.timeout(120):
            while not (found := re.search(rb"Running on (http://\S+)", await server.stderr.readline())):
                pass
        yield f"{found[1].decode()}/"
    finally:
        server.kill()
        await server.communicate()


New = Callable[[], Awaitable[KeyWrapper]]
"""Returns a wrapper with a key of its own."""


@pytest.fixture(params=["keyring", "kms"])
def new(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> New:
    async def new_keyring() -> KeyWrapper:
        keyring = Keyring(tmp_path / f"{secrets.token_hex(4)}.json")
        keyring.turn()
        return keyring

    if request.param == "keyring":
        return new_keyring
    kms, moto = pytest.importorskip("encryption.kms"), request.getfixturevalue("moto")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    async def new_kms() -> KeyWrapper:
        return kms.Kms(await new_key(moto), moto)  # type: ignore[no-any-return]

    return new_kms


@pytest.fixture
async def wrapper(new: New) -> KeyWrapper:
    return await new()


async def test_a_kms_that_is_away_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    kms = pytest.importorskip("encryption.kms")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(KeysUnavailable, match="does not answer"):
        await kms.Kms("arn:aws:kms:us-east-1:1:key/k", "http://127.0.0.1:1/").wrap(bytes(32), "context")


async def test_a_wrapped_key_is_unwrapped(wrapper: KeyWrapper) -> None:
    secret = bytes(range(32))
    wrapped = await wrapper.wrap(secret, "context")
    assert secret.hex() not in wrapped
    assert await wrapper.unwrap(wrapped, "context") == secret


async def test_another_context_is_refused(wrapper: KeyWrapper) -> None:
    """So nobody passes one tenant's key for another one's."""
    wrapped = await wrapper.wrap(bytes(32), "context")
    with pytest.raises(KeysUnavailable):
        await wrapper.unwrap(wrapped, "another")


async def test_what_another_key_has_wrapped_is_refused(wrapper: KeyWrapper, new: New) -> None:
    """Otherwise who can write into the key store would choose the data keys of all that follows."""
    with pytest.raises(KeysUnavailable):
        await wrapper.unwrap(await (await new()).wrap(bytes(32), "context"), "context")


@pytest.mark.parametrize("wrapped", ["", "other:k:AAAA", "other:k:A", "file:k:AAAA", "file:k:A", "kms:AAAA", "kms:A"])
async def test_what_it_has_not_wrapped_is_refused(wrapper: KeyWrapper, wrapped: str) -> None:
    with pytest.raises(KeysUnavailable):
        await wrapper.unwrap(wrapped, "context")
