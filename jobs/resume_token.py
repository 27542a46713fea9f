"""The resume_token of StreamStatus: an offset in a job's output, and a digest of the output before it."""

import hashlib
import re
from typing import Final, NamedTuple, Self

_FORM: Final = re.compile(r"([0-9]{1,15})-([0-9a-f]{16})")
_DIGEST_BYTES: Final = 8
"""Size of the digest. It is enough to distinguish a reader's output from the job's, and protects no secret."""


class ResumeToken(NamedTuple):
    """The end of a part of the output."""

    offset: int
    """The size of the part in UTF-8 bytes."""
    digest: str
    """The digest of the part."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the token that the text holds; None if it is no token."""
        found = _FORM.fullmatch(text)
        return cls(int(found[1]), found[2]) if found else None

    def __str__(self) -> str:
        return f"{self.offset}-{self.digest}"


class Digest:
    """The digest of an output that grows. It is computed for every message of every stream, so it must be cheap."""

    def __init__(self, data: bytes | bytearray | memoryview = b"") -> None:
        self._hash = hashlib.blake2b(data, digest_size=_DIGEST_BYTES)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Append to the output."""
        self._hash.update(data)

    def copy(self) -> "Digest":
        """Return the digest of the same output, which grows apart."""
        copy = Digest()
        copy._hash = self._hash.copy()
        return copy

    def hex(self) -> str:
        """Return the digest as a token holds it."""
        return self._hash.hexdigest()
