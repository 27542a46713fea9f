"""Receiver of webhooks on the loopback interface that can fail in every way a server can."""

import asyncio
import json
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

_MAX_HEAD: Final = 64 * 1024
REASONS: Final = {200: "OK", 204: "No Content", 302: "Found", 410: "Gone", 429: "Slow down", 503: "Unavailable"}


@dataclass
class Request:
    """A received request. Header names are in lower case; the body is unchanged."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """The body, parsed as a CloudEvent."""
        value: dict[str, Any] = json.loads(self.body)
        return value


Reply = Callable[[asyncio.StreamWriter, Request], Awaitable[None]]
"""Function that answers a request, or leaves it unanswered."""


def status(code: int, **headers: str) -> Reply:
    """Answer with a status, no body and these headers. Underscores in their names become hyphens."""

    async def reply(writer: asyncio.StreamWriter, request: Request) -> None:
        lines = [f"HTTP/1.1 {code} {REASONS.get(code, 'Other')}", "content-length: 0", "connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        await writer.drain()

    return reply


async def hang(writer: asyncio.StreamWriter, request: Request) -> None:
    """Never answer."""
    await asyncio.Event().wait()


async def close_early(writer: asyncio.StreamWriter, request: Request) -> None:
    """Close the connection in the middle of the headers."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
    await writer.drain()


async def endless_body(writer: asyncio.StreamWriter, request: Request) -> None:
    """Answer 200 with a body that never ends."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def endless_headers(writer: asyncio.StreamWriter, request: Request) -> None:
    """Answer with headers that never end."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: " + b"x" * 1000 + b"\r\n")
        await writer.drain()


class Receiver:
    """Server that stores all requests by path. It answers each path by its replies in order; the last one repeats."""

    def __init__(self) -> None:
        self.url = ""
        self.port = 0
        self.connections = 0
        """Number of connections opened so far."""
        self._replies: dict[str, list[Reply]] = {}
        self._requests: defaultdict[str, list[Request]] = defaultdict(list)
        self._arrived = asyncio.Condition()
        self._when_connected: Callable[[], None] | None = None

    def on(self, path: str, *replies: Reply) -> str:
        """Set the replies of a path and return its URL."""
        self._replies[path] = list(replies)
        return f"{self.url}{path}"

    def when_connected(self, act: Callable[[], None]) -> None:
        """Call `act` once, at the next connection, before anything is read from it."""
        self._when_connected = act

    async def received(self, path: str, count: int = 1) -> list[Request]:
        """Return the requests of a path once there are at least `count`."""
        async with asyncio.timeout(30), self._arrived:
            await self._arrived.wait_for(lambda: len(self._requests[path]) >= count)
            return list(self._requests[path])

    def so_far(self, path: str) -> list[Request]:
        """Return the requests of a path so far."""
        return list(self._requests[path])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections += 1
        if self._when_connected is not None:
            self._when_connected()
            self._when_connected = None
        try:
            request = await _read(reader)
            async with self._arrived:
                self._requests[request.path].append(request)
                self._arrived.notify_all()
            replies = self._replies.get(request.path, [status(200)])
            await (replies.pop(0) if len(replies) > 1 else replies[0])(writer, request)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(first.split()[1].partition("?")[0], headers, body)


@asynccontextmanager
async def receiving(*, everywhere: bool = False) -> AsyncIterator[Receiver]:
    """Run a receiver on 127.0.0.1, or with `everywhere` on all addresses of this machine."""
    receiver = Receiver()
    serving: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(receiver.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    if not everywhere:
        listener = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0))
    server = await asyncio.start_server(serve, sock=listener, limit=_MAX_HEAD)
    receiver.port = server.sockets[0].getsockname()[1]
    receiver.url = f"http://127.0.0.1:{receiver.port}"
    try:
        yield receiver
    finally:
        server.close()
        for task in list(serving):
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
