"""The files of a tenant that its ledger has counted recently, so that gateways together keep a quota of files.

Temporal lists the files of a tenant, but shows a change after a moment. Gateways find room in that list and in what the
ledger has counted since. Of two that have found the same room, the ledger accepts the first: the second does not know
all that was counted before, gets what it lacks, and looks again. So the ledger needs no limits, and forgets a file as
soon as Temporal surely lists it.

What it remembers must fit into the input of its next run. Where many files come and go it forgets first those that are
gone longest: gateways that have not heard of it count them for a minute more. Beyond so many new files in two minutes
it counts none, and says for how long.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from llm_pb import internal_pb2

_KEPT: Final = timedelta(minutes=2)
"""Time for which a file is kept. A gateway starts its record within 30 s, and Temporal lists that within 30 s more."""
_MAX_FILES: Final = 12_000
"""Maximum number of files that are kept: 1.4 MB. Temporal takes 2 MB."""
_FORGOTTEN_AT_ONCE: Final = 1200
"""Number of files that are gone and are forgotten together, so that not each upload has to look for one."""


class CountedFiles:
    """The files that were counted recently, by id."""

    def __init__(self, files: Iterable[internal_pb2.CountedFile] = (), version: int = 0) -> None:
        self._files = {file.file_id: file for file in files}
        """In the order of their versions."""
        self._version = version

    def count(
        self,
        request: internal_pb2.CountFilesRequest,
        ledger: str,
        now: datetime,
        allows_skew: Callable[[], bool] = lambda: True,
    ) -> internal_pb2.CountFilesResponse:
        """Count the files of a request.

        `allows_skew` is asked whether a file that is gone may be another one than the one counted although it seems
        later. In a replay it says what was so then: gateways know the versions that were given.

        None is counted if its gateway does not know all that was counted before, or if there are too many.
        """
        self._forget(now - _KEPT)
        known = request.known_version if request.known_ledger == ledger else 0
        counted = request.gone or (request.known_ledger == ledger and known == self._version)
        full = counted and not request.gone and not self._make_room(request.files)
        for file in request.files if counted and not full else ():
            last = self._files.get(file.file_id)
            if request.gone and last is not None and not last.gone and _differ(last, file, allows_skew):
                # It was uploaded again before this request arrived.
                continue
            self._version += 1
            one = internal_pb2.CountedFile(
                file_id=file.file_id, size=file.size, gone=request.gone, version=self._version
            )
            one.count_time.FromDatetime(now)
            if file.HasField("create_time"):
                one.create_time.CopyFrom(file.create_time)
            self._files.pop(one.file_id, None)
            self._files[one.file_id] = one
        news = [file for file in self._files.values() if file.version > known]
        if request.gone:
            self._make_room(())
        response = internal_pb2.CountFilesResponse(
            counted=counted and not full, files=news, ledger=ledger, version=self._version
        )
        if full:
            first = next(iter(self._files.values()))
            response.retry_delay.FromTimedelta(first.count_time.ToDatetime(UTC) + _KEPT - now)
        return response

    def _make_room(self, files: Iterable[internal_pb2.CountedFile]) -> bool:
        """Forget files that are gone where there are too many with these; return whether there is room now."""
        excess = len(self._files.keys() | {file.file_id for file in files}) - _MAX_FILES
        if excess <= 0:
            return True
        gone = [id_ for id_, file in self._files.items() if file.gone]
        for id_ in gone[: max(excess, _FORGOTTEN_AT_ONCE)]:
            del self._files[id_]
        return len(gone) >= excess

    def save(self, state: internal_pb2.LedgerState) -> None:
        """Add the files to the state with which the next run begins."""
        state.files.extend(self._files.values())
        state.files_version = self._version

    def _forget(self, before: datetime) -> None:
        for id_, file in [*self._files.items()]:
            if file.count_time.ToDatetime(UTC) >= before:
                return
            del self._files[id_]


def _differ(counted: internal_pb2.CountedFile, gone: internal_pb2.CountedFile, allows_skew: Callable[[], bool]) -> bool:
    """Return whether two files of one id surely differ, by when they were created: see created().

    Which one is the later nobody can tell: they may have been created by the clocks of two gateways.
    """
    one, other = created(counted), created(gone)
    return one != other and 0 not in (one, other) and (one > other or allows_skew())


def created(file: internal_pb2.CountedFile) -> int:
    """Return when a file was created, in nanoseconds since 1970; 0 where its gateway has not said so."""
    return file.create_time.ToNanoseconds()
