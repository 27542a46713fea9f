"""The contract of the store. Every kind must keep it: a folder and servers of the S3 API, encrypted and in clear."""

import asyncio
import os
import random
import secrets
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from encryption import KeyDeleted, KeysUnavailable, Unreadable
from encryption.chunks import CHUNK_BYTES
from store.encrypted import ENDING, EncryptedStore, open_store
from store.objects import ObjectStore, open_objects
from store.settings import StoreSettings
from store.store import (
    MAX_PIECE_BYTES,
    ObjectDamaged,
    ObjectMissing,
    Store,
    StoredObject,
    StoreUnavailable,
    random_name,
)
from tests.support.commands import run, start
from tests.support.encryption import Keys
from tests.support.object_stores import SERVERS, is_installed, s3_server
from tests.support.peers import until_stopped

MIB = 1024 * 1024


@pytest.fixture(scope="module", params=["file", *SERVERS])
async def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, str]]:
    """The settings of one kind of store."""
    folder = tmp_path_factory.mktemp("objects")
    if request.param == "file":
        yield {"STORE_URL": f"file://{folder}"}
    elif not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    else:
        async with s3_server(request.param, folder) as server:
            yield server.environment


def open_with(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, **changes: str) -> ObjectStore:
    for name, value in {**settings, **changes}.items():
        monkeypatch.setenv(name, value)
    return open_objects(StoreSettings())


@pytest.fixture
def objects(kind: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A store of the kind, without objects."""
    return open_with(kind, monkeypatch, STORE_URL=f"{kind['STORE_URL']}/{secrets.token_hex(8)}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    return open_with({"STORE_URL": f"file://{folder}"}, monkeypatch)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture(params=["clear", "encrypted"])
def store(request: pytest.FixtureRequest, objects: ObjectStore, keys: Keys) -> Store:
    return EncryptedStore(objects, None if request.param == "clear" else keys.encryption())


async def pieces_of(content: bytes, size: int = MAX_PIECE_BYTES) -> AsyncIterator[bytes]:
    for at in range(0, len(content), size):
        yield content[at : at + size]


async def put(store: Store, content: bytes, size: int = MAX_PIECE_BYTES, prefix: str = "files/a/") -> StoredObject:
    return await store.put(store.new_name(prefix), pieces_of(content, size))


async def read(store: Store, stored: StoredObject, start: int = 0, end: int | None = None) -> bytes:
    async with aclosing(store.read(stored, start, end)) as pieces:
        found = [piece async for piece in pieces]
    assert all(0 < len(piece) <= MAX_PIECE_BYTES + CHUNK_BYTES for piece in found)
    return b"".join(found)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def names(store: Store, prefix: str = "files/") -> list[str]:
    async with aclosing(store.list(prefix)) as listed:
        return sorted([item.name async for item in listed])


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * MIB, 13 * MIB + 5])
async def test_content_comes_back_whole_and_in_ranges(store: Store, size: int) -> None:
    content = random.Random(size).randbytes(size)
    stored = await put(store, content, 300_000)
    assert stored.size == size
    assert await read(store, stored) == content
    edges = sorted({0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, size // 2, size - 1, size, size + 10})
    for at in (edge for edge in edges if edge >= 0):
        assert await read(store, stored, at) == content[at:]
        assert await read(store, stored, at, at + 70_000) == content[at : at + 70_000]


async def test_objects_are_listed_by_folder_and_removed(store: Store) -> None:
    first, second = await put(store, b"1"), await put(store, b"2")
    other = await put(store, b"3", prefix="files/ab/c/")
    assert await names(store) == sorted([first.name, second.name, other.name])
    assert await names(store, "files/a/") == sorted([first.name, second.name])
    await store.delete([first.name, store.new_name("files/a/"), second.name])
    await store.delete([first.name])
    assert await names(store) == [other.name]
    with pytest.raises(ObjectMissing):
        await read(store, first)
    assert await read(store, other) == b"3"


async def test_names_are_new_and_cannot_be_guessed(store: Store) -> None:
    assert len({store.new_name("files/a/") for _ in range(100)}) == 100
    for prefix in ("", "files", "/files/", "../", "files/../", "a b/", "ä/"):
        with pytest.raises(ValueError, match="no prefix"):
            store.new_name(prefix)


@pytest.mark.parametrize("size", [1000, 12 * MIB])
async def test_pieces_that_end_with_an_error_leave_nothing(store: Store, size: int) -> None:
    async def broken() -> AsyncIterator[bytes]:
        async for piece in pieces_of(bytes(size)):
            yield piece
        raise ConnectionError("the client has gone")

    with pytest.raises(ConnectionError, match="has gone"):
        await store.put(store.new_name("files/a/"), broken())
    assert await names(store) == []


async def test_a_cancelled_put_leaves_nothing_and_reads_no_further_piece(store: Store) -> None:
    sent = asyncio.Event()
    read_on = False

    async def stalled() -> AsyncIterator[bytes]:
        nonlocal read_on
        async for piece in pieces_of(bytes(12 * MIB)):
            yield piece
        sent.set()
        await asyncio.Event().wait()
        read_on = True

    putting = asyncio.create_task(store.put(store.new_name("files/a/"), stalled()))
    await sent.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert not read_on
    assert await names(store) == []


async def test_memory_is_flat_whatever_the_size(store: Store) -> None:
    async def zeros(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield bytes(MIB)

    await store.put(store.new_name("files/a/"), zeros(30))
    before = resident_bytes()
    stored = await store.put(store.new_name("files/a/"), zeros(100))
    async with aclosing(store.read(stored)) as pieces:
        assert sum([len(piece) async for piece in pieces]) == 100 * MIB
    assert resident_bytes() - before < 80 * MIB


async def test_a_killed_writer_leaves_nothing_that_anybody_sees(folder: Path, in_folder: ObjectStore) -> None:
    """In a folder, where what the writer had sent is really there; parts in a bucket are the server's own affair."""
    code = (
        "import asyncio\n"
        "from store.objects import open_objects\nfrom store.settings import StoreSettings\n"
        "async def endless():\n    while True:\n        yield bytes(1 << 20)\n        print('sent', flush=True)\n"
        "asyncio.run(open_objects(StoreSettings()).put('files/a/0', endless()))\n"
    )
    writer = await start(sys.executable, "-c", code)
    assert writer.stdout
    for _ in range(20):
        assert await writer.stdout.readline() == b"sent\n"
    writer.send_signal(signal.SIGKILL)
    await writer.communicate()
    assert [*(folder / "files" / "a").iterdir()], "the test needs a half file"
    assert await names(in_folder) == []
    with pytest.raises(ObjectMissing):
        await read(in_folder, StoredObject("files/a/0", 10 * MIB))

    (draft,) = (folder / "files" / "a").iterdir()
    whole = await put(in_folder, b"1")
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    await in_folder.remove_drafts("files/", an_hour_ago)
    assert draft.exists(), "it may still be written"
    for path in (draft, folder / whole.name):
        os.utime(path, (0, 0))
    await in_folder.remove_drafts("files/", an_hour_ago)
    assert not draft.exists()
    assert await read(in_folder, whole) == b"1"


async def test_a_store_without_drafts_removes_none(store: Store) -> None:
    stored = await put(store, b"1")
    await store.remove_drafts("files/", datetime.now(UTC) + timedelta(hours=1))
    assert await read(store, stored) == b"1"


async def test_a_shortened_object_is_no_content(folder: Path, in_folder: ObjectStore, keys: Keys) -> None:
    for store in (in_folder, EncryptedStore(in_folder, keys.encryption())):
        stored = await put(store, os.urandom(MIB))
        path = folder / stored.name
        os.truncate(path, path.stat().st_size - 16)
        with pytest.raises(ObjectDamaged):
            await read(store, stored)


async def assert_away(store: ObjectStore, stored: StoredObject) -> None:
    for size in (3, 12 * MIB):
        with pytest.raises(StoreUnavailable):
            await put(store, bytes(size))
    with pytest.raises(StoreUnavailable):
        await read(store, stored)
    with pytest.raises(StoreUnavailable):
        await store.delete([stored.name])
    with pytest.raises(StoreUnavailable):
        await names(store)


async def test_a_folder_that_is_away_fails_with_one_error_and_comes_back(folder: Path, in_folder: ObjectStore) -> None:
    stored = await put(in_folder, b"content")
    shutil.move(folder, folder.with_name("away"))
    await assert_away(in_folder, stored)
    shutil.move(folder.with_name("away"), folder)
    assert await read(in_folder, stored) == b"content"


@pytest.mark.server
async def test_a_store_below_a_volume_that_is_not_mounted_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service creates the last folder alone. Under an empty mount point it does not start."""
    volume = tmp_path / "volume"
    (volume / "llm").mkdir(parents=True)
    settings = {"STORE_URL": f"file://{volume}/llm/store"}
    stored = await put(open_with(settings, monkeypatch), b"kept")
    shutil.move(volume, tmp_path / "away")
    volume.mkdir()
    with pytest.raises(StoreUnavailable, match=f"{volume}/llm is not there"):
        open_with(settings, monkeypatch)
    assert not [*volume.iterdir()]
    volume.rmdir()
    shutil.move(tmp_path / "away", volume)
    assert await read(open_with(settings, monkeypatch), stored) == b"kept"


async def test_a_server_that_is_away_fails_with_one_error_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with s3_server("moto", tmp_path) as server:
        store = open_with(server.environment, monkeypatch, STORE_TIMEOUT="PT3S")
        stored = await put(store, b"content")
        await server.kill()
        await assert_away(store, stored)
    async with s3_server("moto", tmp_path, server.port):
        assert await read(store, await put(store, b"content")) == b"content"


@pytest.mark.server
async def test_a_bucket_that_is_not_there_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with s3_server("moto", tmp_path) as server:
        store = open_with(server.environment, monkeypatch, STORE_URL="s3://another")
        for asked in (put(store, b"1"), read(store, StoredObject("files/a", 1)), names(store)):
            with pytest.raises(StoreUnavailable):
                await asked


async def test_a_server_that_never_answers_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        settings = {
            "STORE_URL": "s3://bucket",
            "STORE_ENDPOINT": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
            "STORE_ACCESS_KEY_ID": "marker-id",
            "STORE_SECRET_ACCESS_KEY": "marker-secret",
            "STORE_TIMEOUT": "PT1S",
        }
        store = open_with(settings, monkeypatch)
        for size in (3, 30 * MIB):
            with pytest.raises(StoreUnavailable) as away:
                await put(store, bytes(size))
            assert "marker" not in str(away.value)


@pytest.mark.parametrize("begun", [False, True])
async def test_a_server_that_hangs_ends_reads_after_one_timeout(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts included, whether it hangs before the first piece or between two of them."""
    async with s3_server("moto", tmp_path) as server:
        patient = open_with(server.environment, monkeypatch)
        store = open_with(server.environment, monkeypatch, STORE_TIMEOUT="PT3S")
        content = random.Random(0).randbytes(32 * MIB)
        stored = await put(patient, content)
        async with aclosing(store.read(stored)) as pieces:
            if begun:
                await anext(pieces)
            server.process.send_signal(signal.SIGSTOP)
            until_stopped(server.process.pid)
            last = time.monotonic()

            async def rest() -> None:
                nonlocal last
                async for _ in pieces:
                    last = time.monotonic()

            with pytest.raises(StoreUnavailable):
                await rest()
            assert time.monotonic() - last < 2 * 3
        server.process.send_signal(signal.SIGCONT)
        assert await read(patient, stored) == content


async def test_an_encrypted_object_shows_nothing_and_is_bound_to_its_name_tenant_and_order(
    objects: ObjectStore, keys: Keys
) -> None:
    store = EncryptedStore(objects, keys.encryption()).of_tenant("acme")
    content = b"xyzzy-marker" * 20_000
    stored = await put(store, content)
    assert stored.name.endswith(ENDING)
    (listed,) = await names(objects)
    whole = StoredObject(listed, len(content) + 78 + 16 * 4)
    raw = await read(objects, whole)
    assert b"xyzzy" not in raw
    chunk = CHUNK_BYTES + 16
    header, chunks = raw[:78], [raw[at : at + chunk] for at in range(78, len(raw), chunk)]
    altered = {
        "order": header + b"".join([chunks[1], chunks[0], *chunks[2:]]),
        "cut": header + b"".join(chunks[:-1]),
        "bit": raw[:200] + bytes([raw[200] ^ 1]) + raw[201:],
        "tenant": raw.replace(b"acme", b"acmf", 1),
        "clear": content,
    }
    for name, data in altered.items():
        other = StoredObject(random_name("files/b/", ENDING), len(content))
        await objects.put(other.name, pieces_of(data))
        with pytest.raises((Unreadable, KeysUnavailable, StoreUnavailable)):
            assert await read(store, other), name
    moved = StoredObject(random_name("files/b/", ENDING), len(content))
    await objects.put(moved.name, pieces_of(raw))
    with pytest.raises(Unreadable):
        await read(store, moved)
    assert await read(EncryptedStore(objects, keys.encryption(write=False)), stored) == content
    with pytest.raises(KeysUnavailable):
        await read(EncryptedStore(objects, None), stored)


async def test_the_objects_of_a_deleted_key_are_unreadable(in_folder: ObjectStore, keys: Keys) -> None:
    store = EncryptedStore(in_folder, keys.encryption())
    gone, kept = await put(store.of_tenant("acme"), b"1"), await put(store.of_tenant("other"), b"2")
    ended = await run(sys.executable, "-m", "encryption", "delete-tenant", "acme", **keys.environment)  # type: ignore[arg-type]
    assert ended.status == 0, ended.errors
    fresh = EncryptedStore(in_folder, keys.encryption())
    with pytest.raises(KeyDeleted):
        await read(fresh, gone)
    assert await read(fresh, kept) == b"2"


def test_a_store_without_a_url_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORE_URL", raising=False)
    assert open_store(StoreSettings(), None) is None


@pytest.mark.parametrize(
    "url", ["/folder", "file://host/folder", "file:///", "s3:///x", "http://host", "s3://k:v@b", "s3://b?x=1"]
)
def test_a_url_of_another_form_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_URL", url)
    with pytest.raises(ValueError, match="the URL of a store has the form"):
        StoreSettings()


def test_half_a_credential_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_ACCESS_KEY_ID", "id")
    with pytest.raises(ValueError, match="STORE_SECRET_ACCESS_KEY"):
        StoreSettings()


async def test_a_folder_that_another_has_replaced_is_a_store_that_is_away(
    folder: Path, in_folder: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that started meanwhile created it again. All objects were missing then, as if they were deleted."""
    stored = await put(in_folder, b"kept")
    shutil.move(folder, folder.with_name("away"))
    open_with({"STORE_URL": f"file://{folder}"}, monkeypatch)
    await assert_away(in_folder, stored)
    shutil.rmtree(folder)
    shutil.move(folder.with_name("away"), folder)
    assert await read(in_folder, stored) == b"kept"
