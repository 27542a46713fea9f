"""The files of AsyncClient: uploads and downloads that go on after a break."""

import hashlib
import os
import tempfile
import uuid
from asyncio import to_thread
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from durable_llm._file_stub import RetryingFileStub
from durable_llm._pipe_writer import open_pipe
from durable_llm._upload_source import StreamSource, UploadSource, open_source
from durable_llm.file_errors import ContentMismatch
from llm_pb import common_pb2, file_pb2

Content = str | os.PathLike[str] | bytes | BinaryIO | AsyncIterable[bytes]


class AsyncFiles:
    """The files of the caller's tenant."""

    def __init__(self, stub: RetryingFileStub) -> None:
        self._stub = stub

    async def upload(
        self,
        content: Content,
        *,
        user_id: str,
        request_id: str = "",
        filename: str | None = None,
        purpose: str = "",
        media_type: str = "",
        expire_time: datetime | None = None,
    ) -> file_pb2.File:
        """Upload a file and return it once it is durable. An upload that breaks goes on where it broke.

        `content` is a path, bytes, a binary file that can seek, or an asynchronous iterable of bytes. What cannot seek
        cannot go on: the first break is an error. A repeat with the same user_id and request_id finds the file, or goes
        on with its upload, also in another process. Without a request_id each call makes a file of its own.
        `expire_time` has a time zone.

        Raises ApiError; ContentMismatch when the source has changed meanwhile; OSError when it cannot be read.
        """
        async with open_source(content) as source:
            file = file_pb2.File(
                user_id=user_id,
                filename=source.name if filename is None else filename,
                purpose=purpose,
                ref=common_pb2.FileRef(media_type=media_type),
            )
            if source.size is not None:
                file.ref.size_bytes = source.size
            if expire_time is not None:
                file.expire_time.FromDatetime(expire_time)
            first = file_pb2.UploadFileRequest(file=file, request_id=request_id or uuid.uuid4().hex)
            uploaded = await self._stub.upload(first, source, keep=bool(request_id))
            await self._require_same(source, uploaded)
        return uploaded

    async def content(self, file_id: str, offset: int = 0, limit: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield the content from the offset on, at most `limit` bytes unless that is 0. Raises ApiError.

        A stream that breaks goes on where it broke.
        """
        async with aclosing(self._stub.download(file_id, offset, limit)) as pieces:
            async for piece in pieces:
                yield piece

    async def download(self, file_id: str, path: str | os.PathLike[str]) -> file_pb2.File:
        """Write a file to a path, in place of what is there, and return it. The path is whole or unchanged.

        A link stays, and what it leads to is replaced. A pipe or a device gets the content as it comes. Raises
        ApiError; ContentMismatch when what came is not the file; OSError when it cannot be written.
        """
        file, target = await self.get(file_id), Path(path)
        if await to_thread(lambda: target.exists() and not target.is_file()):
            # A file in its place would be the end of /dev/null.
            async with open_pipe(target) as pipe:
                await self._write(file, pipe.write)
            return file
        target = Path(await to_thread(os.path.realpath, target))
        # A name has at most 255 bytes.
        handle, name = await to_thread(tempfile.mkstemp, dir=target.parent, prefix=f".{target.name[:40]}.")
        try:
            with os.fdopen(handle, "wb") as written:
                await self._write(file, lambda piece: to_thread(written.write, piece))
            # As a new file would have: that of mkstemp is the owner's alone.
            umask = os.umask(0)
            os.umask(umask)
            await to_thread(os.chmod, name, 0o666 & ~umask)
            await to_thread(os.replace, name, target)
        except BaseException:
            await to_thread(Path(name).unlink, missing_ok=True)
            raise
        return file

    async def _write(self, file: file_pb2.File, write: Callable[[bytes], Awaitable[Any]]) -> None:
        """Write the content of a file. Raises ApiError, OSError; ContentMismatch for another content, at the end."""
        sha256 = hashlib.sha256()
        async with aclosing(self.content(file.ref.file_id)) as pieces:
            async for piece in pieces:
                sha256.update(piece)
                await write(piece)
        if sha256.digest() != file.ref.sha256:
            raise ContentMismatch(f"what came of {file.ref.file_id} is not what the service has")

    async def get(self, file_id: str) -> file_pb2.File:
        """Return a file without its content. Raises ApiError."""
        request = file_pb2.GetFileRequest(file_id=file_id)
        response: file_pb2.GetFileResponse = await self._stub.unary("GetFile", request)
        return response.file

    async def list(self, **filters: Any) -> AsyncGenerator[file_pb2.File, None]:
        """Yield files, the newest first, page after page. The filters are the fields of ListFilesRequest.

        Raises ApiError, and ValueError for a filter that ListFilesRequest does not have.
        """
        listed = self._stub.listed("ListFiles", file_pb2.ListFilesRequest(**filters), "files")
        async with aclosing(listed):
            async for file in listed:
                yield file

    async def list_page(self, **fields: Any) -> file_pb2.ListFilesResponse:
        """Return one page. The fields are those of ListFilesRequest. Raises like list()."""
        response: file_pb2.ListFilesResponse = await self._stub.unary("ListFiles", file_pb2.ListFilesRequest(**fields))
        return response

    async def delete(self, file_id: str) -> None:
        """Delete a file. Raises ApiError."""
        await self._stub.unary("DeleteFile", file_pb2.DeleteFileRequest(file_id=file_id))

    async def _require_same(self, source: UploadSource | StreamSource, file: file_pb2.File) -> None:
        sha256 = await source.sha256()
        if sha256 is not None and sha256 != file.ref.sha256:
            raise ContentMismatch(
                f"{file.ref.file_id} is not the source, which has changed, or the key is another file's"
            )
