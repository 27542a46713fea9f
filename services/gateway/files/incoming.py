"""The messages of one upload, as they come."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import timedelta
from typing import Final

from jobs import file_rules
from jobs.field_rules import Violation
from llm_pb import file_pb2
from services.gateway.errors import invalid

SEGMENT_BYTES: Final = 4 * 1024 * 1024
"""Size from which a segment takes no further message, so that a segment is at most a message larger."""
SEGMENT_TIME: Final = timedelta(seconds=5)
"""Time after which a segment takes no further message, however small it is: what a break can cost a slow client."""
_GROWTH: Final = 128
"""Number of segments after which both grow by as much again. So a file of 1 TiB fits into the segments of a record."""
_MAX_SEGMENT_TIME: Final = timedelta(minutes=1)

_END_WAIT: Final = timedelta(seconds=1)
"""Maximum wait for the client to end its side after its last message."""


class Incoming:
    """The data of an upload, cut into segments."""

    def __init__(self, first: file_pb2.UploadFileRequest, requests: AsyncIterator[file_pb2.UploadFileRequest]) -> None:
        self._requests = requests
        self._reading: asyncio.Future[file_pb2.UploadFileRequest | None] | None = None
        self._head = first.data
        self._end = first.offset + len(first.data)
        self.last = first.last
        """Whether the client has said that the file is whole."""
        self._end_is_known = False

    async def begin_segment(self) -> bool:
        """Wait for data; return False when there are no more. Raises ApiError for a message that breaks a rule."""
        while not self._head and not self.last:
            if (message := await self._next(None)) is None:
                return False
            self._take(message)
        if self.last and not self._head:
            await self._require_end()
        return bool(self._head)

    async def segment(self, number: int) -> AsyncGenerator[bytes, None]:
        """Yield the data of a segment that has begun. `number` is that of the segments before it in the file."""
        loop = asyncio.get_running_loop()
        growth = 1 + number // _GROWTH
        most = growth * SEGMENT_BYTES
        size, until = 0, loop.time() + min(growth * SEGMENT_TIME, _MAX_SEGMENT_TIME).total_seconds()
        while self._head:
            data, self._head = self._head, b""
            size += len(data)
            yield data
            while not self._head and not self.last and size < most:
                if (message := await self._next(until - loop.time())) is None:
                    return
                self._take(message)
        if self.last:
            await self._require_end()

    async def close(self) -> None:
        """Stop to read."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _require_end(self) -> None:
        """Raise ApiError for a message after the last one, before the file is whole."""
        if not self._end_is_known:
            if await self._next(_END_WAIT.total_seconds()) is not None:
                raise invalid([Violation("last", "must be only in the last message, and another one has come")])
            self._end_is_known = True

    def _take(self, message: file_pb2.UploadFileRequest) -> None:
        if violations := file_rules.check_later(message, self._end):
            raise invalid(violations)
        self._head, self.last = message.data, message.last
        self._end += len(message.data)

    async def _next(self, seconds: float | None) -> file_pb2.UploadFileRequest | None:
        """Return the next message; None after the last one, and when the time is over. The message is not lost then."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(anext(self._requests, None))
        await asyncio.wait({self._reading}, timeout=seconds)
        if not self._reading.done():
            return None
        # Once the client has ended, the future stays, so that every later call returns None.
        message = self._reading.result()
        if message is not None:
            self._reading = None
        return message
