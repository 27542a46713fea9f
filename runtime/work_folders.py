"""Folders of a process for what it needs on disk while it runs. Those of a process that was killed are removed later.

A folder has a file of its name with the suffix ".lock" next to it. Its process holds a lock on that file, which the
kernel releases when the process ends, however it ends.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)
_SUFFIX: Final = ".lock"


@contextmanager
def work_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Provide a folder, which is removed when the context closes. `parent`: default that of the system. Raises OSError.

    A process that was forked from this one keeps the folder, too.
    """
    lock, path = _locked(prefix, parent or Path(tempfile.gettempdir()))
    folder = path.with_name(path.name.removesuffix(_SUFFIX))
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        path.unlink(missing_ok=True)
        os.close(lock)


def sweep_work_folders(prefix: str, parent: Path | None = None) -> int:
    """Remove the folders of processes that are gone; return how many. Those of other users of the machine stay."""
    removed = 0
    for path in (parent or Path(tempfile.gettempdir())).glob(f"{prefix}*{_SUFFIX}"):
        try:
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            # Its process, or another sweep, has removed it, or it is another user's.
            continue
        try:
            if os.fstat(lock).st_uid != os.getuid():
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = path.with_name(path.name.removesuffix(_SUFFIX))
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
                removed += 1
            path.unlink(missing_ok=True)
        except BlockingIOError:
            # Its process lives.
            continue
        except OSError as error:
            _log.warning("the folder of a process that is gone was not removed: %s", error)
        finally:
            os.close(lock)
    if removed:
        _log.info("removed %d folders of processes that are gone", removed)
    return removed


def _locked(prefix: str, parent: Path) -> tuple[int, Path]:
    """Return a new file with a lock on it."""
    while True:
        lock, name = tempfile.mkstemp(suffix=_SUFFIX, prefix=prefix, dir=parent)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A sweep may have had the lock first, and has removed the file then.
        with suppress(FileNotFoundError):
            if os.stat(name).st_ino == os.fstat(lock).st_ino:
                return lock, Path(name)
        os.close(lock)
