"""Files that may be replaced while the process runs."""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class FileStamps:
    """Detects that files have been replaced or written."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen = self._stamps()

    def changed(self) -> bool:
        """Return whether the files have changed since the last call or, at the first call, since the creation."""
        before, self._seen = self._seen, self._stamps()
        return before != self._seen

    def _stamps(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class Changes:
    """Decides when files must be read again: once they have changed, and until they could be used.

    A file that could not be used may become usable without a change: its owner or mode was wrong, say.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Must be created before the files are read, so that a change meanwhile is seen later."""
        self._stamps = FileStamps(paths)
        self._stale = False
        self._new = False

    def pending(self) -> bool:
        """Return whether the files must be read. The caller then says by used() or failed() how that went."""
        self._new = self._stamps.changed()
        return self._new or self._stale

    def used(self) -> None:
        """The files were read and are in use."""
        self._stale = False

    def failed(self) -> bool:
        """The files could not be used. Return whether that is news, to be logged."""
        self._stale = True
        return self._new


class Reloaded(Generic[T]):
    """What files hold, loaded again once they have changed; what they held last while they cannot be used.

    Any thread may use it.
    """

    def __init__(
        self, paths: Sequence[Path], load: Callable[[], T], what: str, log: logging.Logger, error: type[Exception]
    ) -> None:
        """Load for the first time. Raises what `load` raises.

        An `error` of a later load is logged once for each change. `what` names the files in the log: "TLS files".
        """
        self._what = f"{what}: {', '.join(map(str, paths))}"
        self._kind, self._load, self._log, self._error = what, load, log, error
        self._changes = Changes(paths)
        self._loaded = load()
        self._lock = threading.Lock()

    def current(self) -> T:
        """Return what the files hold, or what they held when they could last be used."""
        with self._lock:
            if self._changes.pending():
                try:
                    self._loaded = self._load()
                except self._error as error:
                    if self._changes.failed():
                        self._log.error(
                            "changed %s cannot be used, the last usable ones stay in use: %s", self._kind, error
                        )
                else:
                    self._changes.used()
                    self._log.info("changed %s are in use", self._what)
            return self._loaded

    @property
    def last(self) -> T:
        """What the files held at the last current(): without a look at them."""
        return self._loaded
