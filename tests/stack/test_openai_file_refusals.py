"""Files over HTTP: what is refused is told with its reason, and what cannot be ended is removed."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from temporalio.client import Client, WorkflowExecutionStatus

from deploy.local.stack import Stack
from durable_llm import AsyncClient
from jobs import names
from tests.support.credentials import KeyFile
from tests.support.files import content, objects, until
from tests.support.http_fronts import RunningFront, running_front

MIB = 1024 * 1024
MOST = 12 * MIB
HEAD = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--x\r\nContent-Disposition: form-data; name="user"\r\n\r\n%s\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
)
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


class Place(NamedTuple):
    """A front whose gateway takes files of at most MOST bytes, and of which a tenant may have less."""

    front: RunningFront
    gateway: str
    key: str
    small_key: str

    @property
    def http(self) -> httpx.AsyncClient:
        return self.front.client

    def authorization(self, *, small: bool = False) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.small_key if small else self.key}"}


@pytest.fixture(scope="module")
async def place(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    key, small_key = (file.add(frozenset({"files:*"}), tenant=tenant) for tenant in ("large", "small"))
    gateway = stack.add(
        "gateway",
        {
            "GATEWAY_API_KEYS_FILE": str(file.path),
            "GATEWAY_TENANTS": json.dumps({"large": {}, "small": {"max_file_bytes": 8 * MIB}}),
            "GATEWAY_FILE_MAX_BYTES": str(MOST),
        },
    )
    await gateway.start()
    await gateway.wait_ready()
    address = stack.address(gateway.name)
    async with running_front(stack, HTTP_GATEWAY=address) as front:
        yield Place(front, address, key, small_key)
    await gateway.terminate()


async def until_removed(temporal: Client, user_id: str) -> None:
    """Return once the record of a user's file is known, and closed."""

    async def is_removed() -> bool:
        query = f"WorkflowType = '{names.FILE_WORKFLOW_TYPE}' AND {names.USER_ID.name} = '{user_id}'"
        found = [item async for item in temporal.list_workflows(query)]
        return bool(found) and all(item.status != WorkflowExecutionStatus.RUNNING for item in found)

    await until(is_removed)


async def form(user_id: str, size: int) -> AsyncIterator[bytes]:
    yield HEAD % user_id.encode()
    for _ in range(size // MIB):
        yield bytes(MIB)
    yield b"\r\n--x--\r\n"


@pytest.mark.parametrize(
    ("small", "status", "reason", "word"),
    [(False, 400, "invalid_request", str(MOST)), (True, 429, "quota_exceeded", str(8 * MIB))],
)
async def test_a_file_that_is_too_large_is_refused_with_the_reason_and_removed(
    place: Place, temporal: Client, small: bool, status: int, reason: str, word: str
) -> None:
    user_id = f"too-large-{small}"
    answer = await place.http.post(
        "/v1/files", content=form(user_id, 200 * MIB), headers=FORM | place.authorization(small=small), timeout=120
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, reason), answer.text
    assert word in error["message"]
    assert (answer.headers.get("retry-after"), answer.headers["x-should-retry"]) == (None, "false")
    await until_removed(temporal, user_id)


async def test_a_form_that_is_cut_off_leaves_no_file(place: Place, temporal: Client) -> None:
    cut = HEAD % b"cut-off" + bytes(6 * MIB)
    answer = await place.http.post("/v1/files", content=cut, headers=FORM | place.authorization())
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the form is cut off")
    await until_removed(temporal, "cut-off")


async def test_a_client_that_leaves_leaves_no_file(place: Place, temporal: Client) -> None:
    host, _, port = place.front.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/files HTTP/1.1\r\nHost: {place.front.address}\r\nContent-Length: {8 * MIB}\r\n"
    for name, value in (FORM | place.authorization()).items():
        head += f"{name}: {value}\r\n"
    writer.write(head.encode() + b"\r\n" + HEAD % b"leaves" + bytes(6 * MIB))
    await writer.drain()
    async with AsyncClient(place.gateway, metadata={"authorization": f"Bearer {place.key}"}) as client:

        async def has_begun() -> bool:
            return any([file.committed_bytes async for file in client.files.list(user_id="leaves")])

        await until(has_begun)
    writer.close()
    await until_removed(temporal, "leaves")


async def test_an_upload_with_a_key_goes_on_after_a_form_that_was_cut_off(place: Place) -> None:
    key = FORM | {"Idempotency-Key": "goes-on"} | place.authorization()
    sent = content(6 * MIB)
    cut = HEAD % b"goes-on" + sent[: 5 * MIB]
    assert (await place.http.post("/v1/files", content=cut, headers=key)).status_code == 400
    whole = HEAD % b"goes-on" + sent + b"\r\n--x--\r\n"
    answer = await place.http.post("/v1/files", content=whole, headers=key)
    assert (answer.status_code, answer.json().get("bytes")) == (200, len(sent)), answer.text
    found = await place.http.get(f"/v1/files/{answer.json()['id']}/content", headers=place.authorization())
    assert found.content == sent


def objects_of(stack: Stack, file_id: str) -> list[Path]:
    """Return the objects of a file in the order of their times."""
    found = (path for path in objects(stack.state_dir / "store") if file_id in str(path))
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


async def uploaded(place: Place, size: int) -> str:
    answer = await place.http.post(
        "/v1/files", files={"file": content(size)}, data={"purpose": "batch"}, headers=place.authorization()
    )
    return str(answer.json()["id"])


async def test_a_content_that_cannot_be_read_is_no_200(place: Place, stack: Stack) -> None:
    id_ = await uploaded(place, MIB)
    (stored,) = objects_of(stack, id_)
    stored.unlink()
    answer = await place.http.get(f"/v1/files/{id_}/content", headers=place.authorization())
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "content_unreadable")
    assert "Traceback" not in place.front.process.log


async def test_a_content_that_breaks_later_ends_its_connection(place: Place, stack: Stack) -> None:
    id_ = await uploaded(place, 10 * MIB)
    objects_of(stack, id_)[-1].unlink()
    with pytest.raises(httpx.RemoteProtocolError):
        await place.http.get(f"/v1/files/{id_}/content", headers=place.authorization())
    assert "Traceback" not in place.front.process.log


@pytest.mark.parametrize("boundary", ["b" * 257, "b" * 4000, '""'])
async def test_a_boundary_that_is_none_is_refused(place: Place, boundary: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"} | place.authorization()
    answer = await place.http.post("/v1/files", content=b"--b", headers=headers)
    assert answer.status_code == 400, answer.text
    assert "Traceback" not in place.front.process.log


@pytest.mark.parametrize("keys", [[""], ["a", "b"], ["k" * 1025], ["a\tb"]])
async def test_a_key_that_is_none_is_refused(place: Place, keys: list[str]) -> None:
    headers = [*place.authorization().items(), *(("Idempotency-Key", key) for key in keys)]
    answer = await place.http.post("/v1/files", files={"file": b"1"}, data={"purpose": "batch"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key"), answer.text


async def test_a_compressed_form_is_refused(place: Place) -> None:
    headers = place.authorization() | {"Content-Encoding": "gzip"}
    answer = await place.http.post("/v1/files", files={"file": b"1"}, data={"purpose": "batch"}, headers=headers)
    assert answer.status_code == 415


@pytest.mark.parametrize("other", [b"CONTENT", b"cont", b"content and more"])
async def test_a_key_of_another_content_is_refused(place: Place, other: bytes) -> None:
    headers = place.authorization() | {"Idempotency-Key": f"other-{len(other)}"}
    send = functools.partial(place.http.post, "/v1/files", data={"purpose": "batch"}, headers=headers)
    first = await send(files={"file": b"content"})
    answer = await send(files={"file": other})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "request_id_reused"), answer.text
    assert (await send(files={"file": b"content"})).json() == first.json()
