"""Server-sent events: a response that sends them as they come, with comments that keep it alive."""

import asyncio
import json
import time
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

        `events` yields what event() and comment() return, each or several joined. It is closed in any case.
        `on_disconnect` is awaited when the client has left before the end, `after` when the stream has ended in any
        other way. `retry` tells browsers when to come back.
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
        sender = _Sender(send)
        pumping = asyncio.create_task(self._pump(sender))
        leaving = asyncio.create_task(_disconnected(receive))
        draining = asyncio.create_task(self._front.draining.wait())
        keeping = asyncio.create_task(sender.keep_alive(self._front.settings.stream_keepalive.total_seconds()))
        tasks = (pumping, leaving, draining, keeping)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            gone = leaving.done() and not pumping.done()
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            self._place.__exit__(None, None, None)
        if gone:
            if self._on_disconnect is not None:
                await self._on_disconnect()
            return
        try:
            if (failed := next((result for result in ended if isinstance(result, Exception)), None)) is not None:
                raise failed
            if pumping.cancelled():
                await sender.send(_LEAVING)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._after is not None:
                await self._after()

    async def _pump(self, sender: "_Sender") -> None:
        async with aclosing(self._events) as events:
            await sender.start(self.status_code, self.raw_headers)
            if self._retry:
                milliseconds = int(self._front.settings.stream_retry.total_seconds() * 1000)
                await sender.send(f"retry: {milliseconds}\n\n".encode())
            async for data in events:
                await sender.send(data)


class _Sender:
    """Sends the parts of one answer, and comments while there are none."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._quiet_since: float | None = None
        """When the last part was sent, by the monotonic clock. None while one is being sent, and before the first."""

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the status and the headers."""
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._quiet_since = time.monotonic()

    async def send(self, data: bytes) -> None:
        """Send a part of the body."""
        self._quiet_since = None
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._quiet_since = time.monotonic()

    async def keep_alive(self, seconds: float) -> None:
        """Send a comment whenever nothing was sent for so long."""
        while True:
            quiet = 0.0 if self._quiet_since is None else time.monotonic() - self._quiet_since
            if quiet >= seconds:
                await self.send(_KEEP_ALIVE)
                quiet = 0.0
            await asyncio.sleep(seconds - quiet)


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
