"""The resume_token of StreamStatus: a place in a job's output, and proof of the output before it."""

import hashlib
import re
from typing import Final, NamedTuple, Self

_FORM: Final = re.compile(r"([0-9]{1,15})-([0-9a-f]{16})")
_DIGEST_BYTES: Final = 8
"""A reader's output against the job's: enough to tell two texts apart by. It keeps no secret."""


class ResumeToken(NamedTuple):
    """A place after a part of the output."""

    offset: int
    """The size of the part in UTF-8 bytes."""
    digest: str
    """The digest of the part."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the token of this text; None when it is no token."""
        found = _FORM.fullmatch(text)
        return cls(int(found[1]), found[2]) if found else None

    def __str__(self) -> str:
        return f"{self.offset}-{self.digest}"


class Digest:
    """The digest of an output that grows. Made for every message of every stream: no more than it must be."""

    def __init__(self, data: bytes | bytearray | memoryview = b"") -> None:
        self._hash = hashlib.blake2b(data, digest_size=_DIGEST_BYTES)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Append to the output."""
        self._hash.update(data)

    def hex(self) -> str:
        """Return the digest as a token holds it."""
        return self._hash.hexdigest()
