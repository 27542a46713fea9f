"""The messages that a client streams."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from typing import Final

from runtime.grpc_requests import RequestLateError

_DRAINED_BYTES: Final = 32 * 1024 * 1024
_LEAST_BYTES: Final = 64 * 1024
_DRAIN_TIME: Final = timedelta(seconds=2)


class ClientMessages:
    """An iterator of messages. A cancel of its reader loses none.

    It ends when the client ends, and when 64 KiB have not come in time: a client that stalls, or sends byte by byte,
    must not hold for ever what its call holds.
    """

    def __init__(self, messages: AsyncIterator[bytes], timeout: timedelta) -> None:
        """`timeout` is the maximum wait for 64 KiB, in one message or several. Only time of waiting counts."""
        self._messages = messages
        self._timeout = timeout.total_seconds()
        self._left, self._received = self._timeout, 0
        self._stalled = False
        self._coming: asyncio.Future[bytes | None] | None = None

    def __aiter__(self) -> "ClientMessages":
        return self

    async def __anext__(self) -> bytes:
        """Return the next message. Raises what the messages raise."""
        if self._stalled:
            raise StopAsyncIteration
        if self._coming is None:
            self._coming = asyncio.ensure_future(anext(self._messages, None))
        began = time.monotonic()
        await asyncio.wait({self._coming}, timeout=self._left)
        self._left = max(self._left - (time.monotonic() - began), 0)
        if not self._coming.done():
            self._stalled = True
            raise StopAsyncIteration
        message = self._coming.result()
        if message is None:
            # The future stays, so that every later call ends, too.
            raise StopAsyncIteration
        self._coming = None
        self._received += len(message)
        if self._received >= _LEAST_BYTES:
            self._left, self._received = self._timeout, 0
        return message

    async def drain(self) -> None:
        """Read what the client still sends, within bounds, before its call ends.

        A client of grpc.aio that is sending when its call ends reports INTERNAL and not the call's status.
        """
        left = _DRAINED_BYTES
        with suppress(TimeoutError, RequestLateError):
            async with asyncio.timeout(_DRAIN_TIME.total_seconds()):
                async for message in self:
                    left -= len(message)
                    if left < 0:
                        return

    async def close(self) -> None:
        """Stop to read."""
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)
