"""Errors of calls about files. They belong to the tree of durable_llm.errors.

ApiError
├── FileNotFound          no file has this id, or it has expired
├── FileNotReady          the upload of the file has not ended
├── FilesDisabled         the service keeps no files
├── WrongOffset           an upload does not go on where the file ends; see committed_bytes
├── UploadOvertaken       another upload of the file was faster
└── Unavailable
    └── StoreUnavailable  the service cannot reach its store of files
DurableLLMError
└── ContentMismatch       what was sent or received is not what the service has
"""

from collections.abc import Mapping
from typing import Final

from durable_llm.errors import ApiError, DurableLLMError, Unavailable


class FileNotFound(ApiError):
    """No file has this id, or it has expired."""

    reason = "FILE_NOT_FOUND"


class FileNotReady(ApiError):
    """The upload of the file has not ended."""

    reason = "FILE_NOT_READY"


class FilesDisabled(ApiError):
    """The service keeps no files: its operator has set no store."""

    reason = "FILES_DISABLED"


class WrongOffset(ApiError):
    """An upload does not go on where the file ends."""

    reason = "WRONG_OFFSET"

    @property
    def committed_bytes(self) -> int:
        """Where the file ends."""
        return int(self.metadata.get("committed_bytes", "0"))


class UploadOvertaken(ApiError):
    """Another upload of the file has written to it meanwhile."""

    reason = "UPLOAD_OVERTAKEN"


class StoreUnavailable(Unavailable):
    """The service cannot reach its store of files now. Nothing is lost."""

    reason = "STORE_UNAVAILABLE"


class ContentMismatch(DurableLLMError):
    """What was sent or received is not what the service has: the source has changed during the upload, for example."""


_KINDS: Final = (FileNotFound, FileNotReady, FilesDisabled, WrongOffset, UploadOvertaken, StoreUnavailable)
FILE_ERRORS: Final[Mapping[str, type[ApiError]]] = {kind.reason: kind for kind in _KINDS}
"""The class for each reason."""
