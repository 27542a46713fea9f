"""Where the content of an upload comes from."""

import hashlib
import io
import os
from asyncio import CancelledError, to_thread
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from durable_llm.file_errors import ContentMismatch

_PIECE_BYTES: Final = 256 * 1024


class UploadSource:
    """A content that can be read from any offset, any number of times."""

    can_seek: Final = True

    def __init__(self, file: BinaryIO, name: str, size: int, start: int = 0) -> None:
        """The content begins at `start` of the file."""
        self._file = file
        self._start = start
        self.name = name
        self.size: int | None = size

    async def pieces(self, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the content from an offset on. Raises OSError."""
        await to_thread(self._file.seek, self._start + offset)
        while piece := await to_thread(self._file.read, _PIECE_BYTES):
            yield piece

    async def sha256(self) -> bytes | None:
        """Return the hash of the content as it is now. Raises OSError."""
        sha256 = hashlib.sha256()
        async for piece in self.pieces(0):
            sha256.update(piece)
        return sha256.digest()


class StreamSource:
    """A content that comes once."""

    can_seek: Final = False

    def __init__(self, content: AsyncIterable[bytes]) -> None:
        self._content = aiter(content)
        self._sha256 = hashlib.sha256()
        self._known = False
        self.name = ""
        self.size: int | None = None

    async def pieces(self, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the content from an offset on: what is before it was uploaded by an earlier call.

        Raises ContentMismatch when the content ends before the offset.
        """
        self._known = True
        begin = 0
        try:
            async for data in self._content:
                self._sha256.update(data)
                for at in range(max(offset - begin, 0), len(data), _PIECE_BYTES):
                    yield data[at : at + _PIECE_BYTES]
                begin += len(data)
        except CancelledError:
            # A generator ends with the cancel of a call that waits for it.
            self._known = False
            raise
        if begin < offset:
            raise ContentMismatch(f"the content has {begin} bytes, and an earlier upload under its key {offset}")

    async def sha256(self) -> bytes | None:
        """Return the hash of the content, of which the rest is read; None if nothing was asked for or it was lost."""
        if not self._known:
            return None
        async for data in self._content:
            self._sha256.update(data)
        return self._sha256.digest()


@asynccontextmanager
async def open_source(content: Any) -> AsyncIterator[UploadSource | StreamSource]:
    """Return the source that a content is, open while the context is. Raises OSError, and TypeError for no content."""
    if isinstance(content, bytes | bytearray | memoryview):
        yield UploadSource(io.BytesIO(content), "", len(content))
    elif isinstance(content, str | os.PathLike):
        path = Path(content)
        file = await to_thread(path.open, "rb")
        try:
            yield UploadSource(file, path.name, os.fstat(file.fileno()).st_size)
        finally:
            await to_thread(file.close)
    elif hasattr(content, "read"):
        start = await to_thread(content.tell)
        size = await to_thread(content.seek, 0, io.SEEK_END) - start
        name = getattr(content, "name", "")
        yield UploadSource(content, Path(name).name if isinstance(name, str) else "", size, start)
    elif hasattr(content, "__aiter__"):
        yield StreamSource(content)
    else:
        raise TypeError("the content is a path, bytes, a binary file or an asynchronous iterable of bytes")
