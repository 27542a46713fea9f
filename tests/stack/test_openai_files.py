"""Files by OpenAI's unmodified client, and what it would not send."""

import asyncio
import io
import random
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from deploy.local.stack import Stack
from tests.stack.test_openai import openai_client
from tests.support.files import content, until
from tests.support.memory import resident_bytes
from tests.support.openapi import Description

MIB = 1024 * 1024


@pytest.fixture(scope="module")
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(stack.address("http"), max_retries=0) as client:
        yield client


@pytest.mark.parametrize("size", [0, 10, 6 * MIB + 1])
async def test_the_stock_client_uploads_retrieves_reads_and_deletes(client: AsyncOpenAI, size: int) -> None:
    sent = content(size)
    created = await client.files.create(
        file=("in.jsonl", io.BytesIO(sent)),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (created.bytes, created.filename, created.purpose, created.status) == (
        size,
        "in.jsonl",
        "batch",
        "processed",
    )
    assert abs(created.created_at - time.time()) < 60
    assert created.expires_at is not None
    assert created.expires_at - created.created_at in range(3590, 3611)
    assert await client.files.retrieve(created.id) == created
    assert (await client.files.content(created.id)).content == sent

    async def is_listed() -> bool:
        return created.id in [file.id async for file in client.files.list(purpose="batch")]

    await until(is_listed)
    gone = await client.files.delete(created.id)
    assert (gone.id, gone.deleted) == (created.id, True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            await call(created.id)


async def test_the_stock_client_lists_page_after_page(client: AsyncOpenAI) -> None:
    purpose = f"pages-{random.randrange(10**9)}"
    created = [
        (await client.files.create(file=(f"{n}", b"x"), purpose=purpose)).id  # type: ignore[arg-type]
        for n in range(3)
    ]

    async def are_listed() -> bool:
        return [file.id async for file in client.files.list(purpose=purpose, limit=2)] == created[::-1]

    await until(are_listed)
    page = await client.files.list(purpose=purpose, after=created[1], limit=2)
    assert ([file.id for file in page.data], page.has_more) == ([created[0]], False)


async def test_what_is_wrong_with_a_form_is_told(stack: Stack, http: httpx.AsyncClient) -> None:
    description = Description((await http.get("/openapi.json")).json())
    file = {"file": ("a.txt", b"content", "text/plain")}
    first = {"purpose": "user_data"}
    boundary = "x"
    late = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n'
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
    )
    cut = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    form = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    for arguments, param, status in (
        ({"files": file}, "purpose", 400),
        ({"files": file, "data": {"purpose": "a b"}}, "purpose", 400),
        ({"files": file, "data": {**first, "unknown": "1"}}, "unknown", 400),
        ({"files": file, "data": {**first, "expires_after[seconds]": "-1"}}, "expires_after[seconds]", 400),
        ({"files": file, "data": {**first, "expires_after[seconds]": "9" * 5000}}, "expires_after[seconds]", 400),
        (
            {"files": file, "data": {**first, "expires_after[seconds]": "000000000060" + "9" * 12}},
            "expires_after[seconds]",
            400,
        ),
        ({"files": {"other": b"1"}, "data": first}, "file", 400),
        ({"json": first}, None, 415),
        ({"content": late, "headers": form}, None, 400),
        ({"content": cut, "headers": form}, "file", 400),
        ({"content": b"garbage", "headers": form}, None, 400),
    ):
        request: dict[str, Any] = {**arguments}
        answer = await http.post("/v1/files", **request)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), (arguments, answer.text)
        await description.check(answer)
    made = await http.post("/v1/files", files=file, data=first, headers={"Idempotency-Key": "a key: of one file"})
    again = await http.post("/v1/files", files=file, data=first, headers={"Idempotency-Key": "a key: of one file"})
    assert made.json() == again.json()
    await description.check(made)
    id_ = made.json()["id"]
    found = await http.get(f"/v1/files/{id_}/content")
    assert (found.content, found.headers["content-disposition"]) == (b"content", "attachment; filename*=UTF-8''a.txt")
    assert (await http.head(f"/v1/files/{id_}/content")).headers["content-length"] == "7"
    digits = "000000000001" + "9" * 5000
    for path in (
        "/v1/files?limit=0",
        f"/v1/files?limit={digits}",
        f"/v1/batches?limit={digits}",
        "/v1/files?order=asc",
        "/v1/files?after=nothing",
    ):
        answer = await http.get(path)
        assert answer.status_code == 400
        await description.check(answer)
    await description.check(await http.get("/v1/files/nothing"))


async def test_the_same_file_twice_at_once_is_one_file(http: httpx.AsyncClient) -> None:
    """An upload that another one has overtaken says so: a repeat finds the file."""
    request: dict[str, Any] = {
        "files": {"file": ("a", bytes(6 * MIB))},
        "data": {"purpose": "user_data"},
        "headers": {"Idempotency-Key": f"twice-{random.randrange(10**9)}"},
    }
    answers = await asyncio.gather(*(http.post("/v1/files", **request) for _ in range(3)))
    found = {answer.json()["id"] for answer in answers if answer.status_code == HTTPStatus.OK}
    refused = [answer for answer in answers if answer.status_code != HTTPStatus.OK]
    assert len(found) == 1
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upload_overtaken"), answer.text
        assert "retry-after" in answer.headers
    assert {(await http.post("/v1/files", **request)).json()["id"]} == found


async def test_a_large_upload_is_not_buffered(stack: Stack, client: AsyncOpenAI) -> None:
    front, gateway = stack.processes["http"], stack.processes["gateway"]
    before = resident_bytes(front), resident_bytes(gateway)
    most = [0, 0]
    done = asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            for index, process in enumerate((front, gateway)):
                most[index] = max(most[index], resident_bytes(process) - before[index])
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    created = await client.files.create(file=("large", bytes(200 * MIB)), purpose="user_data")
    done.set()
    await watching
    assert created.bytes == 200 * MIB
    assert most[0] < 100 * MIB
    assert most[1] < 100 * MIB
    await client.files.delete(created.id)


def _field(name: str, value: str = "1") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


_LONG = "n" * 3500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (b"".join(_field(f"n{n}") for n in range(1000)), "more than 20 fields"),
        (_field("purpose", "p" * 70_000), "more than 65536 bytes"),
        (b"".join(_field(f"{_LONG}{n}") for n in range(20)), "more than 65536 bytes"),
    ],
)
async def test_the_fields_of_a_form_are_bounded_before_they_are_read(
    http: httpx.AsyncClient, fields: bytes, message: str
) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = await http.post("/v1/files", content=fields + _field("file") + b"--x--\r\n", headers=form)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


async def test_the_fields_of_a_form_have_one_deadline(stack: Stack) -> None:
    """However steadily its bytes come."""
    process = stack.add("http", {"HTTP_REQUEST_TIMEOUT": "PT2S"})
    await process.start()
    await process.wait_ready()
    host, _, port = stack.address(process.name).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + _field("purpose", "")[:-2]
    )
    answer = asyncio.create_task(reader.readline())
    async with asyncio.timeout(60):
        while not answer.done():
            writer.write(b"p")
            await asyncio.wait({answer}, timeout=0.2)
    assert answer.result().split()[1] == b"408"
    writer.close()
    await process.terminate()
