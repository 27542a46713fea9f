"""Files that are read again once they have changed: what a read that does not end may cost."""

import logging
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from runtime.files import Reloaded

_LOG = logging.getLogger("test.files")
_TIMEOUT = timedelta(seconds=0.2)


class _Disk:
    """Reads a file, and can be away as a file system of the network can."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.there = threading.Event()
        self.there.set()
        self.reads = 0
        self.error: Exception | None = None

    def read(self) -> str:
        self.reads += 1
        self.there.wait()
        if self.error is not None:
            raise self.error
        return self.path.read_text()


@pytest.fixture
def disk(tmp_path: Path) -> _Disk:
    path = tmp_path / "file"
    path.write_text("first")
    return _Disk(path)


@pytest.fixture
def reloaded(disk: _Disk) -> Reloaded[str]:
    return Reloaded([disk.path], disk.read, "things", _LOG, OSError, _TIMEOUT)


def test_a_change_before_the_call_is_seen(disk: _Disk, reloaded: Reloaded[str]) -> None:
    disk.path.write_text("the second")
    assert reloaded.current() == "the second"


def test_a_read_that_does_not_end_leaves_what_was_read_last(
    disk: _Disk, reloaded: Reloaded[str], caplog: pytest.LogCaptureFixture
) -> None:
    disk.there.clear()
    disk.path.write_text("the second")

    assert reloaded.current() == "first"
    begun = time.monotonic()
    assert [reloaded.current() for _ in range(100)] == ["first"] * 100
    assert time.monotonic() - begun < 100 * _TIMEOUT.total_seconds(), "only the first call waits for the read"
    assert disk.reads == 2, "one read waits, not one for each call"
    assert len(caplog.messages) == 1
    assert "things cannot be read within 0.2 s" in caplog.text

    disk.there.set()
    until = time.monotonic() + 30
    while reloaded.current() != "the second" and time.monotonic() < until:
        time.sleep(0.01)
    assert reloaded.last == "the second"


def test_an_error_that_nobody_expects_is_logged_and_tried_again(
    disk: _Disk, reloaded: Reloaded[str], caplog: pytest.LogCaptureFixture
) -> None:
    disk.error = ZeroDivisionError("of a parser")
    disk.path.write_text("the second")
    assert reloaded.current() == "first"
    assert "changed things cannot be used" in caplog.text
    disk.error = None
    assert reloaded.current() == "the second"


def test_threads_that_look_at_once_see_the_change(disk: _Disk, reloaded: Reloaded[str]) -> None:
    disk.path.write_text("the second")
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(reloaded.current())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["the second"] * 20
    assert disk.reads == 2


def test_a_named_pipe_is_not_read(disk: _Disk, reloaded: Reloaded[str], caplog: pytest.LogCaptureFixture) -> None:
    disk.path.unlink()
    os.mkfifo(disk.path)

    assert reloaded.current() == "first"
    assert "is no regular file" in caplog.text

    disk.path.unlink()
    disk.path.write_text("a file again")
    assert reloaded.current() == "a file again"
