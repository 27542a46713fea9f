"""The content of a file that a request sends, hashed as it comes."""

import hashlib
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Self

from llm_pb import file_pb2
from services.http.failures import Failure


class SentContent:
    """The content that a request sends, an iterator of its pieces."""

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        self._pieces = pieces
        self._size, self._sha256 = 0, hashlib.sha256()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Return the next piece. Raises what the pieces raise."""
        piece = await anext(self._pieces)
        self._size += len(piece)
        self._sha256.update(piece)
        return piece

    async def require_same(self, file: file_pb2.File) -> None:
        """Read what is left. Raises Failure, 409, if an earlier request has uploaded another content."""
        async for _ in self:
            if self._size > file.ref.size_bytes:
                break
        if (self._size, self._sha256.digest()) != (file.ref.size_bytes, file.ref.sha256):
            raise key_reused()


def key_reused() -> Failure:
    """409: the key belongs to a file with another content."""
    message = "the Idempotency-Key was used for a file with another content; choose another key"
    return Failure(HTTPStatus.CONFLICT, message, "REQUEST_ID_REUSED")
