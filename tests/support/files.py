"""How tests upload and download files, by the generated stubs."""

import asyncio
import hashlib
import itertools
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from grpc_status import rpc_status

from llm_pb import file_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.support.jobs import details_of, unpack, until_answered

PATIENCE: Final = 120
PIECE: Final = 1024 * 1024
_numbers = itertools.count(1)


def new_file(**changes: Any) -> dict[str, Any]:
    """Return the fields of the first message of an upload under a new key. `file` has further fields of the file."""
    number = next(_numbers)
    file = {"user_id": f"user-{number}", "filename": "notes.txt", "purpose": "user_data", **changes.pop("file", {})}
    return {"file": file_pb2.File(**file), "request_id": f"req-{number}", **changes}


def messages(
    key: dict[str, Any], content: bytes, offset: int = 0, *, last: bool = True, piece: int = PIECE
) -> Iterator[file_pb2.UploadFileRequest]:
    """Yield the messages of an upload of the content from the offset on."""
    first = True
    while first or offset < len(content):
        data = content[offset : offset + piece]
        end = offset + len(data) == len(content)
        yield file_pb2.UploadFileRequest(**(key if first else {}), offset=offset, data=data, last=last and end)
        first, offset = False, offset + len(data)


async def upload(
    stub: Any, key: dict[str, Any], content: bytes, offset: int = 0, *, last: bool = True, piece: int = PIECE
) -> file_pb2.File:
    """Upload a content and return the file. Call again after Temporal was too busy to answer."""
    goes_on = False
    while True:
        try:
            call = stub.UploadFile(messages(key, content, offset, last=last, piece=piece), timeout=PATIENCE)
            response: file_pb2.UploadFileResponse = await call
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)
            info = unpack(status).get("ErrorInfo") if status else None
            if info is not None and info.reason == "TEMPORAL_UNAVAILABLE":
                goes_on = True
            elif info is not None and info.reason == "WRONG_OFFSET" and goes_on:
                offset = int(info.metadata["committed_bytes"])
            else:
                raise
        else:
            return response.file


async def download(stub: Any, file_id: str, offset: int = 0, limit: int = 0) -> bytes:
    """Return the content from the offset on."""
    found = b""
    request = file_pb2.DownloadFileRequest(file_id=file_id, offset=offset, limit=limit)
    async for message in stub.DownloadFile(request, timeout=PATIENCE):
        found += message.data
        assert message.data
        assert message.next_offset == offset + len(found)
    return found


async def get(stub: Any, file_id: str) -> file_pb2.File:
    response: file_pb2.GetFileResponse = await stub.GetFile(file_pb2.GetFileRequest(file_id=file_id), timeout=PATIENCE)
    return response.file


async def delete(stub: Any, file_id: str) -> None:
    await stub.DeleteFile(file_pb2.DeleteFileRequest(file_id=file_id), timeout=PATIENCE)


async def listed(stub: Any, **filters: Any) -> list[file_pb2.File]:
    """Return the files of all pages."""
    found: list[file_pb2.File] = []
    token = ""
    while True:
        request = file_pb2.ListFilesRequest(page_token=token, **filters)
        page: file_pb2.ListFilesResponse = await stub.ListFiles(request, timeout=PATIENCE)
        found += page.files
        if not (token := page.next_page_token):
            return found


async def until_gone(stub: Any, file_id: str) -> None:
    """Return once nobody finds the file."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await get(stub, file_id)
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return
                raise
            await asyncio.sleep(0.1)


def objects(store: Path) -> set[Path]:
    """Return the files in the folder of a store, from which files and folders may vanish meanwhile."""
    return {Path(folder, name) for folder, _, names in os.walk(store) for name in names}


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """Return once the condition holds."""
    async with asyncio.timeout(PATIENCE):
        while True:
            held = condition()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.1)


async def upload_again(stub: Any, key: dict[str, Any], content: bytes, *, last: bool = True) -> file_pb2.File:
    """Upload a file under the key of one that is being removed."""
    return await until_answered(lambda: upload(stub, key, content, last=last))


class OpenUpload:
    """An upload whose messages the test sends one by one."""

    def __init__(self, stub: FileServiceStub | Any) -> None:
        self._queue: asyncio.Queue[file_pb2.UploadFileRequest | None] = asyncio.Queue()
        self.call = stub.UploadFile(self._messages(), timeout=PATIENCE)

    def send(self, **fields: Any) -> None:
        self._queue.put_nowait(file_pb2.UploadFileRequest(**fields))

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def _messages(self) -> AsyncIterator[file_pb2.UploadFileRequest]:
        while (message := await self._queue.get()) is not None:
            yield message


async def until_committed(stub: Any, file_id: str, least: int) -> int:
    """Return the committed bytes once they are at least so many."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                if (file := await get(stub, file_id)).committed_bytes >= least:
                    return file.committed_bytes
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise
            await asyncio.sleep(0.1)


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def refusal(call: object) -> tuple[str, str]:
    """Return the code and the reason with which a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    return error.value.code().name, details_of(error.value)["ErrorInfo"].reason


async def bad_fields(call: object) -> set[str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT, error.value
    return {violation.field for violation in details_of(error.value)["BadRequest"].field_violations}
