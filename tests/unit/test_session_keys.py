"""The keys of sessions: who follows their file, and that no request waits for it."""

import asyncio
import base64
import os
import threading
from pathlib import Path

import pytest

from runtime.background import beside
from services.http.signin.keys import SessionKeys

PATIENCE = 60


class Disk(type(Path())):  # type: ignore[misc]  # the class of paths of this system
    """A path on a file system that can be away: its looks do not return then."""

    there = threading.Event()
    looked = threading.Event()
    looks = 0

    def stat(self, **how: bool) -> os.stat_result:
        Disk.looks += 1
        Disk.looked.set()
        assert Disk.there.wait(PATIENCE)
        found: os.stat_result = super().stat(**how)
        return found


@pytest.fixture
def path(tmp_path: Path) -> Disk:
    path = Disk(tmp_path / "session-keys")
    path.write_text(new_key())
    Disk.there.set()
    return path


def new_key() -> str:
    return base64.b64encode(os.urandom(32)).decode() + "\n"


async def test_a_request_does_not_look_at_the_file(path: Disk) -> None:
    keys = SessionKeys(path)
    before = Disk.looks
    sealed = keys.unseal("session", keys.seal("session", {"secret": "x"}))
    assert sealed is not None
    assert sealed.value == {"secret": "x"}
    assert Disk.looks == before


async def test_a_disk_that_is_away_holds_up_no_request(path: Disk) -> None:
    keys = SessionKeys(path)
    sealed = keys.seal("session", {})
    Disk.there.clear()
    Disk.looked.clear()
    async with beside(keys.follow()):
        try:
            async with asyncio.timeout(PATIENCE):
                while not Disk.looked.is_set():  # noqa: ASYNC110  # another thread sets it
                    await asyncio.sleep(0.01)
            # The look still runs, and neither the loop nor a request waits for it.
            assert keys.unseal("session", sealed) is not None
        finally:
            Disk.there.set()


async def test_a_changed_file_is_taken(path: Disk) -> None:
    keys = SessionKeys(path)
    sealed = keys.seal("session", {})
    async with beside(keys.follow()):
        path.write_text(new_key())
        async with asyncio.timeout(PATIENCE):
            while keys.unseal("session", sealed) is not None:  # noqa: ASYNC110  # nothing tells that it was read
                await asyncio.sleep(0.05)
