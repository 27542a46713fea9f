"""Streams the content of a file through the front. Uploads are hashed as they come."""

import hashlib
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Self

from starlette.responses import StreamingResponse
from starlette.types import Send

from durable_llm import ApiError
from llm_pb import file_pb2
from services.http.failures import Failure
from services.http.gateway import Calls

_log = logging.getLogger(__name__)


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


class ContentResponse(StreamingResponse):
    """The content of a file, as it comes. If reading fails the connection ends, so that no client takes a part for
    all."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(pieces, headers=headers, media_type="application/octet-stream")
        self._pieces = pieces

    async def stream_response(self, send: Send) -> None:
        """Send the pieces."""
        try:
            async with aclosing(self._pieces):
                await super().stream_response(send)
        except ApiError as error:
            # The server closes the connection of a response that has not ended.
            _log.warning("a download has broken: %s", error)


async def begun_content(calls: Calls, file_id: str) -> AsyncGenerator[bytes, None]:
    """Return the pieces of a file's content, of which the first one was read. Raises ApiError, and so do the pieces."""
    pieces = _content(calls, file_id)
    first = await anext(pieces, b"")

    async def all_pieces() -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return all_pieces()


async def _content(calls: Calls, file_id: str) -> AsyncGenerator[bytes, None]:
    with calls.files("DownloadFile") as files:
        async with aclosing(files.content(file_id)) as pieces:
            async for piece in pieces:
                yield piece
