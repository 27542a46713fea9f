"""Files outlive what breaks: gateways that are killed, a store that is away, uploads that die, keys that go."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs.ids import file_id
from llm_pb import file_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.support.encryption import Keys
from tests.support.files import (
    PIECE,
    OpenUpload,
    content,
    delete,
    download,
    get,
    new_file,
    objects,
    refusal,
    sha256,
    until,
    until_committed,
    until_gone,
    upload,
)
from tests.support.memory import resident_bytes
from tests.support.object_stores import S3Server, s3_server
from tests.support.stacks import stack_settings

MIB = 1024 * 1024
SERVICES = ("temporal", "nats", "gateway")
pytestmark = pytest.mark.timeout(600)


class Place(NamedTuple):
    """A stack that keeps its files in a folder, encrypted."""

    stack: Stack
    store: Path
    keys: Keys

    @property
    def gateway(self) -> Process:
        return self.stack.processes["gateway"]

    def connect(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.stack.address("gateway"))


@pytest.fixture(scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    folder = tmp_path_factory.mktemp("files")
    keys = Keys(folder)
    settings = {
        **keys.environment,
        "STORE_TIMEOUT": "PT5S",
        "GATEWAY_FILE_SWEEP_INTERVAL": "PT1S",
        "GATEWAY_FILE_SWEEP_AGE": "PT60S",
    }
    async with Stack(stack_settings(folder / "stack"), only=SERVICES, environment={"gateway": settings}) as stack:
        yield Place(stack, folder / "stack" / "store", keys)


async def restart(process: Process) -> None:
    await process.kill()
    await process.start()
    await process.wait_ready()


def of_key(key: dict[str, file_pb2.File | str]) -> str:
    file = key["file"]
    assert isinstance(file, file_pb2.File)
    return file_id(file.user_id, str(key["request_id"]), "")


async def test_an_upload_survives_the_gateways_that_are_killed_under_it(place: Place) -> None:
    key, sent = new_file(), content(14 * MIB)
    committed = 0
    for _ in range(2):
        async with place.connect() as channel:
            stub = FileServiceStub(channel)
            sending = OpenUpload(stub)
            sending.send(**key, offset=committed)
            for at in range(committed, committed + 5 * MIB, PIECE):
                sending.send(offset=at, data=sent[at : at + PIECE])
            committed = await until_committed(stub, of_key(key), committed + 4 * MIB)
            await restart(place.gateway)
            with pytest.raises(grpc.aio.AioRpcError):
                await sending.call
        async with place.connect() as channel:
            now = await get(FileServiceStub(channel), of_key(key))
            assert now.committed_bytes >= committed, "what was committed is durable"
            committed = now.committed_bytes
    async with place.connect() as channel:
        stub = FileServiceStub(channel)
        file = await upload(stub, key, sent, committed)
        assert file.ref.sha256 == sha256(sent)
        assert await download(stub, file.ref.file_id) == sent


async def test_a_download_goes_on_after_its_gateway_was_killed(place: Place) -> None:
    sent = content(20 * MIB)
    async with place.connect() as channel:
        id_ = (await upload(FileServiceStub(channel), new_file(), sent)).ref.file_id
        call = FileServiceStub(channel).DownloadFile(file_pb2.DownloadFileRequest(file_id=id_))
        found = bytearray()
        async for message in call:
            found += message.data
            if len(found) > MIB:
                break
        await restart(place.gateway)
    async with place.connect() as channel:
        found += await download(FileServiceStub(channel), id_, len(found))
    assert bytes(found) == sent


async def test_a_store_that_is_away_delays_and_loses_nothing(place: Place) -> None:
    async with place.connect() as channel:
        stub = FileServiceStub(channel)
        kept, gone = await upload(stub, new_file(), b"kept"), await upload(stub, new_file(), b"gone")
        key = new_file()
        await upload(stub, key, b"begun", last=False)
        away = place.store.with_name("away")
        shutil.move(place.store, away)
        try:
            for call in (upload(stub, key, b"begun and ended", 5), download(stub, kept.ref.file_id)):
                assert await refusal(call) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
            assert (await get(stub, of_key(key))).committed_bytes == 5
            await delete(stub, gone.ref.file_id)
            await until_gone(stub, gone.ref.file_id)
        finally:
            shutil.move(away, place.store)
        file = await upload(stub, key, b"begun and ended", 5)
        assert await download(stub, file.ref.file_id) == b"begun and ended"
        assert await download(stub, kept.ref.file_id) == b"kept"
        await until(lambda: not any(gone.ref.file_id in str(path) for path in objects(place.store)))


async def test_the_sweeper_removes_old_objects_that_no_file_has_and_no_others(place: Place) -> None:
    async with place.connect() as channel:
        stub = FileServiceStub(channel)
        file, key = await upload(stub, new_file(), content(6 * MIB)), new_file()
        await upload(stub, key, b"under way", last=False)
        named = {path for path in objects(place.store) if file.ref.file_id in str(path) or of_key(key) in str(path)}
        long_ago = time.time() - 3600
        for path in named:
            os.utime(path, (long_ago, long_ago))
        (some,) = {path.parent for path in named if file.ref.file_id in str(path)}
        unknown = place.store / "files" / "-" / f"file-{'0' * 64}" / ("0" * 32)
        unknown.mkdir(parents=True)
        left = [some / ("0" * 32), unknown / f"{'0' * 32}.enc", unknown / f"{'1' * 32}#1"]
        young = some / ("2" * 32)
        for path in (*left, young):
            path.write_bytes(b"bytes that no record names")
        for path in left:
            os.utime(path, (long_ago, long_ago))
        await until(lambda: not any(path.exists() for path in left))
        assert young.exists()
        assert all(path.exists() for path in named)
        assert len(await download(stub, file.ref.file_id)) == 6 * MIB


async def test_the_store_and_temporal_hold_no_content_in_clear(place: Place) -> None:
    marker = b"xyzzy-marker"
    async with place.connect() as channel:
        stub = FileServiceStub(channel)
        key = new_file(file={"filename": "xyzzy-name"})
        file = await upload(stub, key, marker * 10_000)
        assert await download(stub, file.ref.file_id) == marker * 10_000
    assert not any(marker in path.read_bytes() for path in objects(place.store))
    database = (place.stack.state_dir / "temporal.db").read_bytes()
    wal = (place.stack.state_dir / "temporal.db-wal").read_bytes()
    for text in (marker, b"xyzzy-name"):
        assert text not in database
        assert text not in wal


async def test_the_memory_of_a_stalled_download_is_bounded(place: Place) -> None:
    async with place.connect() as channel:
        stub = FileServiceStub(channel)
        file = await upload(stub, new_file(), bytes(64 * MIB))
        before = resident_bytes(place.gateway)
        calls = [stub.DownloadFile(file_pb2.DownloadFileRequest(file_id=file.ref.file_id)) for _ in range(8)]
        for call in calls:
            await call.read()
        await asyncio.sleep(3)  # Nothing happens that could be waited for: the gateway must not read on.
        assert resident_bytes(place.gateway) - before < 150 * MIB
        for call in calls:
            call.cancel()


async def test_files_in_a_bucket_outlive_its_server(tmp_path: Path) -> None:
    async with s3_server("moto", tmp_path) as server:
        environment = {**server.environment, "STORE_TIMEOUT": "PT3S"}
        async with (
            Stack(stack_settings(tmp_path / "stack"), only=SERVICES, environment={"gateway": environment}) as stack,
            grpc.aio.insecure_channel(stack.address("gateway")) as channel,
        ):
            stub = FileServiceStub(channel)
            key, sent = new_file(), content(9 * MIB)
            file = await upload(stub, key, sent)
            assert await download(stub, file.ref.file_id, 3 * MIB) == sent[3 * MIB :]
            begun = new_file()
            await upload(stub, begun, b"abc", last=False)
            server.process.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(9):
                assert await refusal(download(stub, file.ref.file_id)) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
            server.process.send_signal(signal.SIGCONT)
            assert await download(stub, file.ref.file_id) == sent
            await server.kill()
            assert await refusal(upload(stub, begun, b"abcdef", 3)) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
            assert (await get(stub, of_key(begun))).committed_bytes == 3
    assert isinstance(server, S3Server)


async def test_an_object_of_another_name_stays_and_ends_no_sweep(place: Place) -> None:
    folder = place.store / "files"
    of_a_file = folder / "-" / f"file-{'1' * 64}" / ("1" * 32)
    of_a_file.mkdir(parents=True)
    strangers = [folder / "stranger", folder / "-" / "stranger", of_a_file / "stranger"]
    left = of_a_file / ("1" * 32)
    long_ago = time.time() - 3600
    for path in (*strangers, left):
        path.write_bytes(b"bytes that no record names")
        os.utime(path, (long_ago, long_ago))
    await until(lambda: not left.exists())
    left.write_bytes(b"left behind once more")
    os.utime(left, (long_ago, long_ago))
    await until(lambda: not left.exists())
    assert place.gateway.running, "the gateway goes on"
    assert all(path.exists() for path in strangers)
    for path in strangers:
        path.unlink()
