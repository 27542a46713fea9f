"""The files of a tenant that its ledger has counted recently, so that gateways together keep a quota of files.

Temporal lists the files of a tenant, but shows a change after a moment. Gateways find room in that list and in what the
ledger has counted since. Of two that have found the same room, the ledger accepts the first: the second does not know
all that was counted before, gets what it lacks, and looks again. So the ledger needs no limits, and forgets a file as
soon as Temporal surely lists it.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from llm_pb import internal_pb2

_KEPT: Final = timedelta(minutes=2)
"""Time for which a file is kept. A gateway starts its record within 30 s, and Temporal lists that within 30 s more."""


class CountedFiles:
    """The files that were counted recently, by id."""

    def __init__(self, files: Iterable[internal_pb2.CountedFile] = (), version: int = 0) -> None:
        self._files = {file.file_id: file for file in files}
        """In the order of their versions."""
        self._version = version

    def count(
        self, request: internal_pb2.CountFilesRequest, ledger: str, now: datetime
    ) -> internal_pb2.CountFilesResponse:
        """Count the files of a request, unless its gateway does not know all that was counted before."""
        self._forget(now - _KEPT)
        known = request.known_version if request.known_ledger == ledger else 0
        counted = request.gone or (request.known_ledger == ledger and known == self._version)
        for file in request.files if counted else ():
            self._version += 1
            one = internal_pb2.CountedFile(
                file_id=file.file_id, size=file.size, gone=request.gone, version=self._version
            )
            one.count_time.FromDatetime(now)
            self._files.pop(one.file_id, None)
            self._files[one.file_id] = one
        news = [file for file in self._files.values() if file.version > known]
        return internal_pb2.CountFilesResponse(counted=counted, files=news, ledger=ledger, version=self._version)

    def save(self, state: internal_pb2.LedgerState) -> None:
        """Add the files to the state with which the next run begins."""
        state.files.extend(self._files.values())
        state.files_version = self._version

    def _forget(self, before: datetime) -> None:
        for id_, file in [*self._files.items()]:
            if file.count_time.ToDatetime(UTC) >= before:
                return
            del self._files[id_]
