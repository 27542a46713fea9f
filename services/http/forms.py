"""A form with one file (multipart/form-data), read as it comes: the file is never in memory as a whole."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from http import HTTPStatus
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from durable_llm.errors import Violation
from services.http.failures import Failure, bad_request
from services.http.settings import HttpSettings

_FILE: Final = "file"
_MAX_FIELDS: Final = 20
"""Maximum number of fields before the file."""
_MAX_FIELDS_BYTES: Final = 64 * 1024
"""Maximum size of all fields before the file, with their heads and the head of the file."""
_DRAINED_BYTES: Final = 32 * 1024 * 1024
_MAX_BOUNDARY: Final = 256
_LEAST_BYTES: Final = 16 * 1024
"""Size of what has to come of the file within the time of a request. A client that sends byte by byte would hold its
place for ever."""
_CLOSE: Final = {"Connection": "close"}


class UploadForm:
    """A form whose last part is a file."""

    def __init__(self, request: Request, settings: HttpSettings) -> None:
        """Raises Failure: 415 for a request that is no such form, 400 for a boundary that the parser does not take."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data" or b"boundary" not in options:
            words = "the body must be a form with the file, with Content-Type: multipart/form-data"
            raise Failure(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, words, headers=_CLOSE)
        if not 1 <= len(options[b"boundary"]) <= _MAX_BOUNDARY:
            words = f"the boundary of the form must have 1 to {_MAX_BOUNDARY} characters"
            raise Failure(HTTPStatus.BAD_REQUEST, words, "INVALID_REQUEST", headers=_CLOSE)
        self.fields: dict[str, str] = {}
        """The fields before the file, by name."""
        self.filename = ""
        self.media_type = ""
        self._seconds = settings.request_timeout.total_seconds()
        self._body: AsyncIterator[bytes] = request.stream()
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._take_header_name,
                "on_header_value": self._take_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_head,
                "on_part_data": self._take_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )
        self._name, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._field: str | None = None
        self._data = bytearray()
        self._parts = 0
        self._fields_bytes = 0
        self._in_file = False
        self._file_ended = False
        self._ended = False

    async def read_fields(self) -> None:
        """Read up to the file.

        Raises Failure: 400 for a form without one, or with fields beyond the bounds; 408 for fields that do not all
        come in time.
        """
        now = asyncio.get_running_loop().time
        until = now() + self._seconds
        while not self._in_file and not self._file_ended:
            if self._ended or not await self._feed(until - now()):
                raise bad_request(Violation(_FILE, "is required, as the last part of the form"))

    async def content(self) -> AsyncGenerator[bytes, None]:
        """Yield the file.

        Raises Failure: 400 for a form that is cut off, or has a part after the file; 408 for a file that comes too
        slowly. Only the time of waiting for it counts.
        """
        now = asyncio.get_running_loop().time
        left, received = self._seconds, 0
        while True:
            if self._data:
                data = bytes(self._data)
                self._data.clear()
                received += len(data)
                if received >= _LEAST_BYTES:
                    left, received = self._seconds, 0
                yield data
            elif self._ended:
                return
            else:
                began = now()
                if not await self._feed(left):
                    raise bad_request(message="the form is cut off")
                left = max(left - (now() - began), 0)

    async def drain(self) -> None:
        """Read and drop what the client still sends, within bounds. Some clients read no answer before they have sent
        all."""
        left = _DRAINED_BYTES
        try:
            async with asyncio.timeout(self._seconds):
                async for piece in self._body:
                    left -= len(piece)
                    if left < 0:
                        return
        except (TimeoutError, ClientDisconnect):
            return

    async def _feed(self, seconds: float) -> bool:
        """Parse the next piece of the body; return False after the last one. Raises Failure, 408 after the seconds."""
        try:
            async with asyncio.timeout(seconds):
                piece = await anext(self._body, None)
        except TimeoutError:
            lacks = f"brought {_LEAST_BYTES} bytes of its file" if self._in_file else "come as far as its file"
            words = f"the body has not {lacks} within {self._seconds:g} s"
            raise Failure(HTTPStatus.REQUEST_TIMEOUT, words, headers=_CLOSE) from None
        except ClientDisconnect:
            raise bad_request(message="the client has gone") from None
        if piece is None:
            return False
        try:
            self._parser.write(piece)
        except FormParserError:
            raise bad_request(message="the body is no multipart/form-data") from None
        return True

    def _begin_part(self) -> None:
        if self._file_ended:
            raise bad_request(message="the file must be the last part of the form")
        self._parts += 1
        if self._parts > _MAX_FIELDS + 1:
            raise bad_request(message=f"the form has more than {_MAX_FIELDS} fields before the file")
        self._headers = {}

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def _end_head(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode(errors="replace")
        self._in_file = name == _FILE
        self._field = None if self._in_file else name
        if self._in_file:
            self.filename = options.get(b"filename", b"").decode(errors="replace")
            self.media_type = self._headers.get(b"content-type", b"").decode(errors="replace")
        elif name in self.fields:
            raise bad_request(Violation(name, "is there more than once"))

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._count(end - start)
        self._data += data[start:end]

    def _end_part(self) -> None:
        if self._in_file:
            self._in_file, self._file_ended = False, True
        elif self._field is not None:
            self.fields[self._field] = bytes(self._data).decode(errors="replace")
            self._data.clear()

    def _end(self) -> None:
        self._ended = True

    def _count(self, size: int) -> None:
        """Count what comes before the content of the file. Raises Failure beyond the bound."""
        self._fields_bytes += size
        if self._fields_bytes > _MAX_FIELDS_BYTES:
            raise bad_request(message=f"the fields before the file have more than {_MAX_FIELDS_BYTES} bytes")
