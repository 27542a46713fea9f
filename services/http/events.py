"""Server-sent events: a response that sends them as they come, with comments that keep it alive."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.http.front import Front

_KEEP_ALIVE: Final = b": keep-alive\n\n"
_LEAVING: Final = b": the front is shutting down; open the stream again\n\n"


def event(data: Any, *, name: str = "", id: str = "") -> bytes:  # noqa: A002  # as the field is called
    """Return an event as it is sent. `data` is a text of one line, or a value that becomes JSON.

    Without a `name` browsers get it as `message`. An `id` is what a client sends as `Last-Event-ID` to continue.
    """
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    fields = (("event", name), ("id", id), ("data", text))
    return "".join(f"{field}: {value}\n" for field, value in fields if value).encode() + b"\n"


def comment(text: str) -> bytes:
    """Return a comment, which clients ignore, as it is sent."""
    return f": {text}\n\n".encode()


class EventStream(Response):
    """Sends events as they come.

    It ends when the events do, when the client leaves, and when the process shuts down: a client whose stream ends
    without the last event of its protocol comes back. A client that does not read holds one event and the buffer of its
    connection, which services.http.connection closes in the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        front: Front,
        *,
        on_disconnect: Callable[[], Awaitable[None]] | None = None,
        after: Callable[[], Awaitable[None]] | None = None,
        retry: bool = True,
    ) -> None:
        """Raises Failure, 503, when too many streams are open.

        `events` yields what event() and comment() return, and is closed in any case. `on_disconnect` is awaited when
        the client has left before the end, `after` when the stream has ended in any other way. `retry` tells browsers
        when to come back.
        """
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        # The length is that of the empty body.
        del self.headers["content-length"]
        self._events = events
        self._front = front
        self._on_disconnect = on_disconnect
        self._after = after
        self._retry = retry
        self._place = front.stream()
        self._place.__enter__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        pumping = asyncio.create_task(self._pump(send))
        leaving = asyncio.create_task(_disconnected(receive))
        draining = asyncio.create_task(self._front.draining.wait())
        tasks = (pumping, leaving, draining)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            gone = leaving.done() and not pumping.done()
        finally:
            for task in tasks:
                task.cancel()
            (ended, *_) = await asyncio.gather(*tasks, return_exceptions=True)
            self._place.__exit__(None, None, None)
        if gone:
            if self._on_disconnect is not None:
                await self._on_disconnect()
            return
        try:
            if isinstance(ended, Exception):
                raise ended
            if isinstance(ended, asyncio.CancelledError):
                await _send(send, _LEAVING)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._after is not None:
                await self._after()

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if self._retry:
                milliseconds = int(self._front.settings.stream_retry.total_seconds() * 1000)
                await _send(send, f"retry: {milliseconds}\n\n".encode())
            while (data := await self._next(events, send)) is not None:
                await _send(send, data)

    async def _next(self, events: AsyncGenerator[bytes, None], send: Send) -> bytes | None:
        """Return the next event, None at the end. Meanwhile comments are sent."""
        seconds = self._front.settings.stream_keepalive.total_seconds()
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait((coming,), timeout=seconds))[0]:
                await _send(send, _KEEP_ALIVE)
            return coming.result()
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait((coming,))


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
