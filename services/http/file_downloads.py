"""The content of a file on its way to a client, as it comes from the gateway."""

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from http import HTTPStatus
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from durable_llm import ApiError
from llm_pb import file_pb2
from services.http.failures import Failure
from services.http.gateway import Calls

_log = logging.getLogger(__name__)


async def download_file(calls: Calls, request: Request, file_id: str) -> Response:
    """Answer with the content of a file. Raises ApiError; Failure, 409, for a file whose upload has not ended."""
    with calls.files("GetFile") as files:
        file = await files.get(file_id)
    if file.state != file_pb2.FILE_STATE_READY:
        raise Failure(HTTPStatus.CONFLICT, f"the upload of {file_id} has not ended", "FILE_NOT_READY")
    headers = {"Content-Length": str(file.ref.size_bytes), "Cache-Control": "no-store"}
    # Whatever the uploader called it, a browser must not run it as a page of this server.
    headers |= {"X-Content-Type-Options": "nosniff", "Content-Disposition": _disposition(file)}
    if request.method == "HEAD":
        return Response(headers=headers, media_type="application/octet-stream")
    return _ContentResponse(await _begun_content(calls, file_id), headers)


def _disposition(file: file_pb2.File) -> str:
    """Return the header that lets a browser save the file under its name."""
    return f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}" if file.filename else "attachment"


class _ContentResponse(StreamingResponse):
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


async def _begun_content(calls: Calls, file_id: str) -> AsyncGenerator[bytes, None]:
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
