"""The connection of a client. It adds two limits that uvicorn lacks: on the head of a request, and on unread data."""

import asyncio
import functools
from datetime import timedelta
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from services.http.settings import HttpSettings


class Connection(H11Protocol):
    """Closes the connection of a client that sends no whole head in time, or that stops reading."""

    def __init__(self, times: HttpSettings, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._times = times
        self._head: asyncio.TimerHandle | None = None
        self._read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to wait for a request."""
        super().connection_made(transport)
        self._head = self._abort_after(self._times.request_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        for timer in (self._head, self._read):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has come. The first bytes of a further request start the wait for its rest."""
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._head = self._abort_after(self._times.request_timeout)
        super().data_received(data)

    def handle_events(self) -> None:
        """Handle what has been read. With a request the wait for its head ends."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._head is not None:
            self._head.cancel()
            self._head = None

    def pause_writing(self) -> None:
        """Start to wait for the client to read."""
        super().pause_writing()
        if self._read is None:
            self._read = self._abort_after(self._times.stall_timeout)

    def resume_writing(self) -> None:
        """End the wait for the client to read."""
        super().resume_writing()
        if self._read is not None:
            self._read.cancel()
            self._read = None

    def _abort_after(self, time: timedelta) -> asyncio.TimerHandle:
        # Not close(), which waits until the client has read what is left.
        return self.loop.call_later(time.total_seconds(), self.transport.abort)


def connections(settings: HttpSettings) -> Any:
    """Return the class of the connections, as uvicorn takes it."""
    return functools.partial(Connection, settings)
