"""The form of an upload that comes too slowly."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from services.http.failures import Failure
from services.http.forms import UploadForm
from services.http.settings import HttpSettings

HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


async def test_a_file_that_comes_byte_by_byte_does_not_hold_its_place_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece comes too late."""
    monkeypatch.setenv("HTTP_REQUEST_TIMEOUT", "PT0.5S")

    async def body() -> AsyncIterator[bytes]:
        yield HEAD
        for _ in range(100):
            await asyncio.sleep(0.02)
            yield b"a"
        yield b"\r\n--x--\r\n"

    request: Any = SimpleNamespace(headers={"content-type": "multipart/form-data; boundary=x"}, stream=body)
    form = UploadForm(request, HttpSettings())
    await form.read_fields()
    with pytest.raises(Failure, match=r"16384 bytes of its file within 0\.5 s") as caught:
        async for _ in form.content():
            pass
    assert caught.value.status == 408
