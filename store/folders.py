"""The files of a store in a folder: what its library leaves to us. These functions block."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from encryption.durable_file import sync_folder

_DRAFT: Final = re.compile(r".+#[0-9]+")
"""The name of a file that the library writes until the object is whole. An object's name has no `#`."""


def sync(folder: Path, name: str) -> None:
    """Sync an object and the folders that lead to it to disk: a loss of power must not take what was acknowledged."""
    path = folder / name
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    for parent in path.parents:
        sync_folder(parent)
        if parent == folder:
            break


def remove_drafts(folder: Path, before: float) -> None:
    """Remove the drafts under the folder that nobody has written to since `before`, in seconds since the epoch."""
    for parent, _, files in os.walk(folder):
        for name in filter(_DRAFT.fullmatch, files):
            path = Path(parent, name)
            # Meanwhile a writer may have ended or given up.
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()
