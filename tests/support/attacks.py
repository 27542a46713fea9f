"""Clients that do not read answers or do not end requests: raw HTTP/2 connections.

gRPC's own clients read ahead of the program that uses them, so this module writes HTTP/2 frames to a socket (RFC 9113).
A connection acknowledges settings and pings, without which the server would close it. It accepts as many bytes of each
answer as its window allows, and sends as many bytes of a request as the server's windows allow.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

from google.protobuf.message import Message

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE: Final = 4
_MAX_WINDOW: Final = 2**31 - 1
Metadata = tuple[tuple[str, str | bytes], ...]
_CONNECTION_WINDOW: Final = 65_535
_FRAME_BYTES: Final = 16_384


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """Return an HTTP/2 frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, int, int, bytes]:
    """Return the next frame's type, flags, stream and payload."""
    header = await reader.readexactly(9)
    payload = await reader.readexactly(int.from_bytes(header[:3], "big"))
    return header[3], header[4], int.from_bytes(header[5:], "big"), payload


def call_frames(stream: int, method: str, request: bytes, metadata: Metadata = ()) -> bytes:
    """Return the frames of a call with one request."""
    body = b"\0" + len(request).to_bytes(4, "big") + request
    return header_frame(stream, method, metadata=metadata) + frame(DATA, body, END_STREAM, stream)


def header_frame(stream: int, method: str, flags: int = 0, metadata: Metadata = ()) -> bytes:
    """Return the frame that begins a call."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **dict(metadata),
    }
    # The fields are literals without indexing (RFC 7541, section 6.2.2). No name or value is longer than 126 bytes.
    headers = b"".join(
        b"\0" + b"".join(bytes((len(part),)) + part for part in map(_bytes, field)) for field in fields.items()
    )
    return frame(HEADERS, headers, END_HEADERS | flags, stream)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class StalledClient:
    """One connection that reads a limited number of bytes of each answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._next_stream = 1
        self.begun: set[int] = set()
        """Streams of the calls whose response headers have come."""
        self.ended: set[int] = set()
        """Streams of the calls that the server has ended, with any status."""
        self.closed = asyncio.Event()
        """Set once the server has closed the connection."""
        self.received: Counter[int] = Counter()
        """Bytes of DATA received, by the call's stream."""
        self._sending_windows: Counter[int] = Counter({0: _CONNECTION_WINDOW})
        """Bytes that may be sent, by stream. 0 is the connection; a stream's count is added to the initial window."""
        self._initial_window = _CONNECTION_WINDOW
        self._news = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    def call(self, method: str, request: Message, count: int = 1, metadata: Metadata = ()) -> None:
        """Begin `count` calls of a method such as "/llm.v1.LlmService/GetStatus"."""
        data = request.SerializeToString()
        for _ in range(count):
            self._writer.write(call_frames(self._next_stream, method, data, metadata))
            self._next_stream += 2

    def call_without_request(self, method: str, count: int = 1, *, ended: bool = False) -> None:
        """Begin `count` calls without a request. `ended` ends the stream of requests."""
        for _ in range(count):
            self._writer.write(header_frame(self._next_stream, method, END_STREAM if ended else 0))
            self._next_stream += 2

    async def upload(
        self,
        method: str,
        request: bytes,
        count: int,
        metadata: Metadata = (),
        *,
        withheld: int = 0,
        followed_by: bytes = b"",
    ) -> None:
        """Make `count` concurrent calls with a large request.

        The client does not end a call if it withholds the last bytes of the request or sends other bytes after it.
        Return once everything is sent or the server has ended the calls.
        """
        body = b"\0" + len(request).to_bytes(4, "big") + request + followed_by
        goal = len(body) - withheld
        ending = not withheld and not followed_by
        sent = dict.fromkeys(range(self._next_stream, self._next_stream + 2 * count, 2), 0)
        self._next_stream += 2 * count
        for stream in sent:
            self._writer.write(header_frame(stream, method, metadata=metadata))
        while sent and not self.closed.is_set():
            moved = False
            for stream, at in list(sent.items()):
                window = self._initial_window + self._sending_windows[stream]
                size = min(self._sending_windows[0], window, _FRAME_BYTES, goal - at)
                if stream in self.ended or at == goal:
                    del sent[stream]
                elif size > 0:
                    end = at + size
                    self._writer.write(frame(DATA, body[at:end], END_STREAM if ending and end == goal else 0, stream))
                    self._sending_windows.subtract({0: size, stream: size})
                    sent[stream] = end
                    moved = True
            if moved:
                # The server may close the connection.
                with contextlib.suppress(ConnectionError):
                    await self._writer.drain()
            elif sent:
                async with self._news:
                    await self._news.wait()

    def take(self, size: int, call: int = 0) -> None:
        """Accept `size` more bytes of the answer of the call with this index."""
        self._writer.write(frame(WINDOW_UPDATE, size.to_bytes(4, "big"), stream=2 * call + 1))

    async def until_received(self, size: int) -> None:
        """Return once `size` bytes of the first call's answer have come, or the connection is closed."""
        async with self._news:
            await self._news.wait_for(lambda: self.closed.is_set() or self.received[1] >= size)

    @property
    def calls(self) -> int:
        """Number of calls that were begun."""
        return self._next_stream // 2

    async def all_answered(self) -> None:
        """Return once every call has response headers or has ended, or the connection is closed."""
        async with self._news:
            await self._news.wait_for(lambda: self.closed.is_set() or len(self.begun | self.ended) == self.calls)

    async def all_ended(self) -> None:
        """Return once the server has ended every call or closed the connection."""
        async with self._news:
            await self._news.wait_for(lambda: self.closed.is_set() or len(self.ended) == self.calls)

    async def until_ended(self, count: int) -> None:
        """Return once the server has ended `count` calls or closed the connection."""
        async with self._news:
            await self._news.wait_for(lambda: self.closed.is_set() or len(self.ended) >= count)

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()
        await self._reading

    async def _read(self) -> None:
        try:
            while True:
                kind, flags, stream, payload = await read_frame(self._reader)
                if kind in (SETTINGS, PING) and not flags & ACK:
                    self._writer.write(frame(kind, payload if kind == PING else b"", ACK))
                if kind == SETTINGS:
                    for at in range(0, len(payload), 6):
                        if int.from_bytes(payload[at : at + 2], "big") == _INITIAL_WINDOW_SIZE:
                            self._initial_window = int.from_bytes(payload[at + 2 : at + 6], "big")
                if kind == WINDOW_UPDATE:
                    self._sending_windows[stream] += int.from_bytes(payload, "big")
                if kind == DATA:
                    self.received[stream] += len(payload)
                if kind == HEADERS:
                    self.begun.add(stream)
                if kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                    self.ended.add(stream)
                async with self._news:
                    self._news.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            async with self._news:
                self.closed.set()
                self._news.notify_all()
            self._writer.close()


@asynccontextmanager
async def stalled_clients(address: str, connections: int = 1, window: int = 0) -> AsyncIterator[list[StalledClient]]:
    """Open connections that read at most `window` bytes of each answer. The context closes them."""
    host, port = address.rsplit(":", 1)
    clients = []
    for _ in range(connections):
        reader, writer = await asyncio.open_connection(host, port)
        setting = _INITIAL_WINDOW_SIZE.to_bytes(2, "big") + window.to_bytes(4, "big")
        writer.write(PREFACE + frame(SETTINGS, setting))
        # All calls share the window of the connection, so it has the maximum size and limits none of them.
        writer.write(frame(WINDOW_UPDATE, (_MAX_WINDOW - _CONNECTION_WINDOW).to_bytes(4, "big")))
        clients.append(StalledClient(reader, writer))
    try:
        yield clients
    finally:
        await asyncio.gather(*(client.close() for client in clients), return_exceptions=True)


async def flood(clients: Iterable[StalledClient], method: str, request: Message, count: int) -> None:
    """Begin `count` calls, spread over the connections, and return once each has response headers or has ended."""
    spread = list(clients)
    for number, client in enumerate(spread):
        client.call(method, request, count // len(spread) + (number < count % len(spread)))
    await asyncio.gather(*(client.all_answered() for client in spread))
