"""Files whose content is damaged, cut or deleted, and uploads that do not end where they say."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from deploy.local.stack import Stack
from jobs.ids import file_id
from llm_pb import file_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.support.files import (
    OpenUpload,
    bad_fields,
    content,
    delete,
    download,
    get,
    new_file,
    objects,
    refusal,
    until,
    upload,
)

MIB = 1024 * 1024


@pytest.fixture(scope="module")
async def files(stack: Stack) -> AsyncIterator[FileServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield FileServiceStub(channel)


def objects_of(stack: Stack, file: file_pb2.File) -> list[Path]:
    """Return the objects of a file in the order of their times."""
    found = (path for path in objects(stack.state_dir / "store") if file.ref.file_id in str(path))
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


async def test_an_object_that_was_cut_is_lost_and_not_away(files: FileServiceStub, stack: Stack) -> None:
    file = await upload(files, new_file(), content(3 * MIB))
    (stored,) = objects_of(stack, file)
    os.truncate(stored, MIB)
    for offset in (0, 2 * MIB):
        assert await refusal(download(files, file.ref.file_id, offset)) == ("DATA_LOSS", "CONTENT_UNREADABLE")


async def test_a_bit_that_was_flipped_never_comes_as_whole(files: FileServiceStub, stack: Stack) -> None:
    sent = content(6 * MIB)
    file = await upload(files, new_file(), sent)
    stored = objects_of(stack, file)[0]
    damaged = bytearray(stored.read_bytes())
    damaged[1000] ^= 1
    stored.write_bytes(damaged)
    found = bytearray()

    async def read() -> None:
        async for message in files.DownloadFile(file_pb2.DownloadFileRequest(file_id=file.ref.file_id)):
            found.extend(message.data)

    assert await refusal(read()) == ("DATA_LOSS", "CONTENT_UNREADABLE")
    assert len(found) < len(sent)


async def test_a_file_that_is_deleted_while_it_is_read_is_not_found(files: FileServiceStub, stack: Stack) -> None:
    file = await upload(files, new_file(), content(40 * MIB))
    stored = objects_of(stack, file)
    coming = aiter(files.DownloadFile(file_pb2.DownloadFileRequest(file_id=file.ref.file_id)))
    await anext(coming)
    await delete(files, file.ref.file_id)
    await until(lambda: not any(path.exists() for path in stored))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in coming:
            pass
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    errors = [line for line in stack.processes["gateway"].log.splitlines() if '"ERROR"' in line]
    assert not [line for line in errors if file.ref.file_id in line]


async def test_a_message_after_the_last_one_is_an_error(files: FileServiceStub) -> None:
    key = new_file()
    sending = OpenUpload(files)
    sending.send(**key, data=b"abc", last=True)
    sending.send(offset=3, data=b"def", last=True)
    sending.end()
    assert await bad_fields(sending.call) == {"last"}
    id_ = file_id(key["file"].user_id, key["request_id"], "")
    assert (await get(files, id_)).state == file_pb2.FILE_STATE_UPLOADING
