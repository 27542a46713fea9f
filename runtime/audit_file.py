"""The audit log in a file: lines of JSON, appended and synced to the disk."""

import asyncio
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from encryption import durable_file
from runtime.audit import AuditUnavailable
from runtime.environment import WrongSetting

_MODE: Final = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP
_NONE: Final = -1


class AuditFile:
    """An AuditStore in a file, which belongs to one process.

    Each write is one append and one fsync, in a thread of its own. An outside tool may move the file away (logrotate
    without copytruncate): the next write makes a new one.
    """

    def __init__(self, path: Path, setting: str) -> None:
        """Open the file, which `setting` names. Raises WrongSetting when it cannot be opened."""
        self._path = path
        self._file = _NONE
        self._torn = False
        self._thread = ThreadPoolExecutor(1, "audit")
        try:
            self._open()
        except OSError as error:
            raise WrongSetting(f"{setting}: the audit log {path} cannot be opened: {error.strerror}") from error

    async def write(self, records: Sequence[bytes]) -> None:
        """See AuditStore."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._append, b"".join(records))
        except OSError as error:
            raise AuditUnavailable(f"{self._path}: {error.strerror}") from error

    async def close(self) -> None:
        """See AuditStore."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def _append(self, data: bytes) -> None:
        if self._moved():
            self._close()
        if self._file == _NONE:
            self._open()
        # A line that was cut, by a full disk or a kill, is ended first.
        rest = memoryview(b"\n" + data if self._torn else data)
        size = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError:
            self._torn |= 0 < len(rest) < size
            # After a failed fsync a second one of the same descriptor may succeed although data is lost.
            self._close()
            raise
        self._torn = False

    def _moved(self) -> bool:
        """Return whether the path does not lead to the open file any more."""
        if self._file == _NONE:
            return False
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return True

    def _open(self) -> None:
        created = not self._path.exists()
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _MODE)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        if created:
            durable_file.sync_folder(self._path.parent)

    def _close(self) -> None:
        if self._file != _NONE:
            os.close(self._file)
            self._file = _NONE
