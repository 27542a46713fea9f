"""The contract of key wrappers, kept by the file and by KMS."""

import asyncio
import base64
import json
import re
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from pydantic import ValidationError

from encryption import KeysUnavailable
from encryption.key_wrapper import KeyWrapper
from encryption.keyring import Keyring
from encryption.settings import EncryptionSettings
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
        keyring.create()
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


ODD_ANSWERS = {
    "no JSON": web.Response(body=b"<html>"),
    "no text": web.Response(body=b"\xff"),
    "no object": web.json_response([1]),
    "no key": web.json_response({}),
    "no base64": web.json_response({"Plaintext": "\N{SNOWMAN}"}),
    "half of base64": web.json_response({"Plaintext": "A"}),
    "a short key": web.json_response({"Plaintext": "AAAA"}),
    "an error": web.json_response({"__type": "DisabledException"}, status=400),
}


@pytest.mark.parametrize("odd", [*ODD_ANSWERS, "a redirect"])
async def test_a_kms_that_answers_oddly_is_unavailable(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing but its own URL is called: a redirect could lead a key in clear out of TLS."""
    kms = pytest.importorskip("encryption.kms")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    paths = list[str]()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        paths.append(request.path)
        if request.path == "/elsewhere":
            return web.json_response({"Plaintext": base64.b64encode(bytes(32)).decode()})
        if odd == "a redirect":
            raise web.HTTPTemporaryRedirect("/elsewhere")
        return ODD_ANSWERS[odd]

    async with RawTestServer(answer) as server:
        wrapper = kms.Kms("arn:aws:kms:us-east-1:1:key/k", str(server.make_url("/")))
        with pytest.raises(KeysUnavailable):
            await wrapper.unwrap("kms:AAAA", "context")
    assert paths == ["/"]


@pytest.mark.parametrize("url", ["http://kms.example/", "http://10.0.0.1:8080", "kms.example", "ftp://localhost/"])
def test_data_keys_do_not_go_to_a_kms_in_clear(url: str, tmp_path: Path) -> None:
    settings = {"key_store": tmp_path, "kms_key": "arn:aws:kms:us-east-1:1:key/k"}
    with pytest.raises(ValidationError, match="https"):
        EncryptionSettings(kms_url=url, **settings)
    for good in ("https://kms.example/", "http://127.0.0.1:8080", "http://[::1]:8080/", "http://localhost:8080"):
        assert EncryptionSettings(kms_url=good, **settings).kms_url == good


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
