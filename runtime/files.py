"""Files that settings name, and that may be replaced while the process runs."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Generic, TypeVar

from pydantic import AfterValidator

from runtime.health import Readiness

T = TypeVar("T")

READ_TIMEOUT: Final = timedelta(seconds=2)
"""Maximum time that a look at files may keep its caller waiting."""


def _readable(path: Path) -> Path:
    """Return the path. Raises ValueError for what cannot be read: settings report it as theirs."""
    try:
        # A named pipe would block whoever opens it.
        if regular := path.is_file() or not path.exists():
            path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not regular:
        raise ValueError(f"{path} is no regular file")
    return path


ReadableFile = Annotated[Path, AfterValidator(_readable)]
"""The type of a setting that names a file, which the process reads."""


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class Reloaded(Generic[T]):
    """What files hold, loaded again once they have changed; what they held last while they cannot be used.

    A file that could not be used is tried again without a change: its owner or mode may have been wrong. Any thread may
    use it.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        load: Callable[[], T],
        what: str,
        log: logging.Logger,
        error: type[Exception],
        timeout: timedelta = READ_TIMEOUT,
        meanwhile: str = "the last usable ones stay in use",
    ) -> None:
        """Load for the first time. Raises what `load` raises.

        An `error` of a later load is logged once for each change, with what holds `meanwhile`. `what` names the files
        in the log: "TLS files".
        """
        self._paths, self._kind, self._load, self._log, self._error = paths, what, load, log, error
        self._meanwhile = meanwhile
        # Made before the files are read, so that a change meanwhile is seen later.
        self._stamps = [_stamp(path) for path in paths]
        self._stale = False
        self._loaded = load()
        self._timeout = timeout.total_seconds()
        self._lock = threading.Lock()
        self._look: threading.Thread | None = None
        self._look_ends = 0.0

    def current(self) -> T:
        """Return what the files hold, or what they held when they could last be used.

        Takes at most the timeout: a file system that is away can block a read without end.
        """
        # A look that was already running may have begun before the change that this call has to see.
        while not self._looked():
            pass
        return self._loaded

    @property
    def last(self) -> T:
        """What the files held at the last current(): without a look at them."""
        return self._loaded

    @property
    def usable(self) -> bool:
        """Whether the files could be used at the last current()."""
        return not self._stale

    def _looked(self) -> bool:
        """Wait for a look at the files. Return False if it had been running before."""
        with self._lock:
            if new := self._look is None or not self._look.is_alive():
                # Not of a pool: the process would wait at its end for a read that never returns.
                self._look = threading.Thread(target=self._reload, name=f"look at {self._kind}", daemon=True)
                self._look_ends = time.monotonic() + self._timeout
                self._look.start()
            look, remaining = self._look, self._look_ends - time.monotonic()
        look.join(max(remaining, 0))
        if not look.is_alive():
            return new
        if new:
            self._log.error(
                "%s cannot be read within %g s, %s: %s",
                self._kind,
                self._timeout,
                self._meanwhile,
                ", ".join(map(str, self._paths)),
            )
        return True

    def _reload(self) -> None:
        stamps = [_stamp(path) for path in self._paths]
        changed, self._stamps = stamps != self._stamps, stamps
        if not changed and not self._stale:
            return
        # Until it is known to be good: whatever ends the look, the next one tries again.
        self._stale = True
        try:
            self._require_files()
            self._loaded = self._load()
        # The file system may raise an OSError where `load` has none of its own.
        except (self._error, _NotAFileError, OSError) as error:
            if changed:
                self._log.error("changed %s cannot be used, %s: %s", self._kind, self._meanwhile, error)
        except Exception:  # noqa: BLE001  # the next look tries again
            if changed:
                self._log.exception("changed %s cannot be used, %s", self._kind, self._meanwhile)
        else:
            self._stale = False
            self._log.info("changed %s are in use: %s", self._kind, ", ".join(map(str, self._paths)))

    def _require_files(self) -> None:
        """Raises _NotAFileError for what would block a read for ever: a named pipe, say."""
        for path in self._paths:
            if path.exists() and not path.is_file():
                raise _NotAFileError(f"{path} is no regular file")


def want_usable(
    readiness: Readiness, name: str, files: Reloaded[Any], meanwhile: str = "what they held last stays in use"
) -> None:
    """Report files that cannot be used any more as degraded. It looks at them whenever readiness is asked."""

    async def usable() -> bool:
        await asyncio.to_thread(files.current)
        return files.usable

    readiness.want(name, f"cannot be used: {meanwhile}", usable)


class _NotAFileError(Exception):
    """A path leads to something that is no regular file."""
