"""Small files that are on disk before they are used, and that readers find complete or not at all."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_draft(path: Path, text: str) -> Path:
    """Write a new hidden file next to the path, sync it to disk and return it, to be renamed or linked to the path.

    If the path exists, the file has its owner and permissions: an operator may replace a file of the services. Raises
    OSError.
    """
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    draft = Path(name)
    with _removed_on_error(draft), os.fdopen(handle, "w") as file:
        with contextlib.suppress(FileNotFoundError):
            present = path.stat()
            os.fchmod(handle, present.st_mode & 0o777)
            with contextlib.suppress(PermissionError):
                os.fchown(handle, present.st_uid, present.st_gid)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return draft


def replace(path: Path, text: str) -> None:
    """Write the file, in place of the present one if there is one. A link goes on to name it. Raises OSError."""
    path = path.resolve()
    draft = write_draft(path, text)
    with _removed_on_error(draft):
        draft.rename(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _removed_on_error(draft: Path) -> Iterator[None]:
    """Remove a draft, which may hold keys, if the body raises."""
    try:
        yield
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder while the context is open.

    Of two concurrent changes of a file in it, the second would drop what the first one added. Raises OSError.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Sync the names of a folder to disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
