"""The Python client's files: they survive breaks, and are checked at both ends."""

import asyncio
import hashlib
import io
import os
import select
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Stack
from durable_llm import AsyncClient, Client, RetryPolicy
from durable_llm.errors import InvalidRequest, RequestIdReused
from durable_llm.file_errors import ContentMismatch, FileNotFound
from llm_pb import file_pb2
from tests.support.commands import Ended, run
from tests.support.files import content, sha256, until
from tests.support.paths import ROOT
from tests.support.stacks import stack_settings

MIB = 1024 * 1024
PATIENT = RetryPolicy(give_up_after=timedelta(minutes=2))


@pytest.fixture(scope="module")
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(stack.address("gateway")) as client:
        yield client


async def stream(sent: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(sent), MIB):
        yield sent[at : at + MIB]


@pytest.mark.parametrize("kind", ["path", "bytes", "file", "stream"])
async def test_a_content_of_each_kind_goes_up_and_comes_back(client: AsyncClient, tmp_path: Path, kind: str) -> None:
    sent = content(5 * MIB + 3)
    path = tmp_path / "sent.bin"
    path.write_bytes(sent)
    skipped = io.BytesIO(b"skipped" + sent)
    skipped.seek(7)
    kinds = {"path": path, "bytes": sent, "file": skipped, "stream": stream(sent)}
    file = await client.files.upload(kinds[kind], user_id="alice", purpose="vision", media_type="a/b")  # type: ignore[arg-type]
    assert (file.ref.sha256, file.ref.size_bytes) == (sha256(sent), len(sent))
    assert (file.filename, file.purpose) == ("sent.bin" if kind == "path" else "", "vision")
    assert await client.files.get(file.ref.file_id) == file
    target = tmp_path / "target.bin"
    target.write_bytes(b"before")
    assert await client.files.download(file.ref.file_id, target) == file
    assert target.read_bytes() == sent
    assert sorted(os.listdir(tmp_path)) == ["sent.bin", "target.bin"]
    found = b"".join([piece async for piece in client.files.content(file.ref.file_id, 10, MIB)])
    assert found == sent[10 : 10 + MIB]
    await client.files.delete(file.ref.file_id)
    with pytest.raises(FileNotFound):
        await client.files.get(file.ref.file_id)


async def test_a_pipe_is_written_to_and_not_replaced(client: AsyncClient, tmp_path: Path) -> None:
    file = await client.files.upload(sent := content(MIB), user_id="alice")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = asyncio.create_task(asyncio.to_thread(pipe.read_bytes))
    assert await client.files.download(file.ref.file_id, pipe) == file
    assert await reading == sent
    assert pipe.is_fifo()
    # Nor is a link, such as /dev/stdout: what it leads to is.
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"before")
    link.symlink_to(target)
    assert await client.files.download(file.ref.file_id, link) == file
    assert link.is_symlink()
    assert target.read_bytes() == sent


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "🙂" * 63], ids=["1 byte", "2 bytes", "4 bytes"])
async def test_a_file_may_have_the_longest_name(client: AsyncClient, tmp_path: Path, name: str) -> None:
    file = await client.files.upload(b"x", user_id="alice")
    await client.files.download(file.ref.file_id, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"x"


@pytest.mark.parametrize("read", [False, True], ids=["nobody reads", "nobody reads on"])
async def test_a_download_into_a_pipe_that_waits_can_be_ended(client: AsyncClient, tmp_path: Path, read: bool) -> None:
    """No thread stays in the wait, which would keep the process from its end until a second Ctrl-C."""
    file = await client.files.upload(content(MIB), user_id="alice")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) if read else None
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await client.files.download(file.ref.file_id, pipe)
    if reader is None:
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        # An end is only there once a writer has been.
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        assert poll.poll(200) == []
    else:
        while os.read(reader, MIB):
            pass
    os.close(reader)


async def test_a_refusal_is_told_while_data_are_sent(client: AsyncClient) -> None:
    await client.files.upload(b"content", user_id="bob", request_id="one")
    again = await client.files.upload(b"content", user_id="bob", request_id="one")
    assert again.ref.size_bytes == 7
    with pytest.raises(RequestIdReused):
        await client.files.upload(bytes(20 * MIB), user_id="bob", request_id="one")
    with pytest.raises(ContentMismatch):
        await client.files.upload(b"CONTENT", user_id="bob", request_id="one")
    with pytest.raises(InvalidRequest):
        await client.files.upload(b"", user_id="no user")


async def test_transfers_go_on_when_the_gateway_is_killed(tmp_path: Path) -> None:
    sent = content(30 * MIB)
    async with Stack(stack_settings(tmp_path / "stack"), only=("temporal", "nats", "gateway")) as stack:
        gateway = stack.processes["gateway"]

        async def restart() -> None:
            await gateway.kill()
            await gateway.start()
            await gateway.wait_ready()

        async with AsyncClient(stack.address("gateway"), retry=PATIENT) as client:
            (tmp_path / "sent").write_bytes(sent)
            uploading = asyncio.create_task(
                client.files.upload(tmp_path / "sent", user_id="alice", request_id="killed")
            )

            async def has_begun() -> bool:
                return any([file.committed_bytes async for file in client.files.list(user_id="alice")])

            while not uploading.done() and not await has_begun():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await restart()
            file = await uploading
            assert file.ref.sha256 == sha256(sent)
            found = bytearray()
            async for piece in client.files.content(file.ref.file_id):
                found += piece
                if len(found) == len(piece):
                    await restart()
            assert bytes(found) == sent


def test_the_client_without_asyncio_has_files(stack: Stack, tmp_path: Path) -> None:
    with Client(stack.address("gateway")) as client:
        file = client.files.upload(io.BytesIO(b"content"), user_id="sync", filename="a.txt")
        assert file.state == file_pb2.FILE_STATE_READY
        client.files.download(file.ref.file_id, tmp_path / "a.txt")
        assert hashlib.sha256((tmp_path / "a.txt").read_bytes()).digest() == file.ref.sha256
        assert b"".join(client.files.content(file.ref.file_id)) == b"content"
        assert client.files.get(file.ref.file_id) == file
        client.files.delete(file.ref.file_id)
        with pytest.raises(FileNotFound):
            client.files.get(file.ref.file_id)


async def cli(stack: Stack, *arguments: str, cwd: Path) -> Ended:
    address = stack.address("gateway")
    environment: Any = {"DURABLE_LLM_ADDRESS": address, "DURABLE_LLM_CONFIG": str(cwd / "none.toml")}
    return await run(
        sys.executable, "-m", "durable_llm", "files", *arguments, cwd=cwd, PYTHONPATH=str(ROOT), **environment
    )


async def test_the_command_line_puts_gets_lists_and_removes(stack: Stack, tmp_path: Path) -> None:
    sent = content(2 * MIB)
    (tmp_path / "sent.jsonl").write_bytes(sent)
    put = await cli(stack, "put", "sent.jsonl", "--user", "cli-files", "--purpose", "batch", cwd=tmp_path)
    assert put.status == 0, put.errors
    id_ = put.output.strip()
    assert (await cli(stack, "get", id_, cwd=tmp_path)).status == 2, "it replaces no file that nobody named"
    got = await cli(stack, "get", id_, "again.jsonl", cwd=tmp_path)
    assert got.output == f"again.jsonl {len(sent)} bytes\n", got.errors
    assert (tmp_path / "again.jsonl").read_bytes() == sent

    async def is_listed() -> bool:
        listed = await cli(stack, "ls", "--user", "cli-files", cwd=tmp_path)
        return listed.output.startswith(f"{id_}\tready\t{len(sent)}\tbatch\tcli-files\t")

    await until(is_listed)
    assert (await cli(stack, "rm", id_, cwd=tmp_path)).status == 2, "nobody was asked"
    assert (await cli(stack, "rm", id_, "--yes", cwd=tmp_path)).output == f"{id_} removed\n"
    gone = await cli(stack, "get", id_, "-", cwd=tmp_path)
    assert gone.status == 3, gone.errors
