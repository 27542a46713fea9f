"""Bounds the time and the memory for which calls wait for their requests.

grpc.aio waits for a request without a limit, and never closes a call whose client has ended it without one. Such calls
cost their client a few bytes each and would use up the server's calls. So methods of one request are registered as if
they streamed requests, and the first request is used.

Once gRPC has been asked for a request it buffers all of it that arrives, up to the maximum message size, and does not
report how much that is. So few calls may ask concurrently. The clients of the others have sent no more than the
server's HTTP/2 window.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NoReturn

import grpc

from runtime.grpc_interceptor import Details, Handler, Interceptor, behavior_of, refuse, with_behavior
from runtime.tracebacks import forget_frames

MAX_QUEUED: Final = 1000
"""Maximum number of calls that wait for a place."""
_Context = grpc.aio.ServicerContext[Any, Any]
_MOMENT: Final = timedelta(milliseconds=100)
"""Time within which a request that has arrived is read."""
_LATE: Final = 2
_STALLED: Final = 10


class GivenUpError(Exception):
    """The call has waited for its request, and other calls need its place."""


class Unread:
    """Messages that gRPC holds and clients have not read yet, one for each call."""

    def __init__(self, most: int) -> None:
        """`most`: maximum number that may stay unread for longer than a moment."""
        self._most = most
        self._all: dict[_Context, _Sent] = {}
        self.of_peer: Counter[str] = Counter()
        """Number that each peer has not read."""

    def add(self, context: _Context) -> None:
        """Count the call's message, which is passed to gRPC now."""
        self._all[context] = _Sent(context.peer())
        self.of_peer[context.peer()] += 1

    def remove(self, context: _Context) -> None:
        """Stop counting the call's message, if it is counted: it was sent, or the call is over."""
        if context in self._all:
            peer = self._all.pop(context).peer
            self.of_peer[peer] -= 1
            if not self.of_peer[peer]:
                del self.of_peer[peer]

    def stalled(self) -> set[str]:
        """Return the peers that have left a message unread for too long. To be called every second.

        The limit is ten seconds. While more than the maximum are unread it is two seconds, and peers with most unread
        come first. Time is counted in calls of this method: removals that happened meanwhile are known by the next
        call, even in a process that pauses at times.
        """
        for sent in self._all.values():
            sent.checks += 1
        late = Counter(sent.peer for sent in self._all.values() if sent.checks >= _LATE)
        found = {sent.peer for sent in self._all.values() if sent.checks >= _STALLED}
        left = late.total()
        for peer, count in late.most_common():
            if left <= self._most:
                break
            found.add(peer)
            left -= count
        return found


@dataclass
class _Sent:
    peer: str
    checks: int = 0


@dataclass(eq=False)
class _Wait:
    """A call that waits for a request."""

    peer: str
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    given_up: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    seen: bool = False

    def give_up(self) -> None:
        if not self.given_up.done():
            self.given_up.set_result(None)


class Places:
    """A limited number of calls that ask for their requests concurrently. The others queue by connection.

    A call whose request has arrived leaves its place within a moment. While others queue, calls that have had their
    place for longer are given up, except as many as half of the places. The connection with most of them loses its
    oldest call first.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        # In order of entry, oldest first.
        self._taken: dict[_Wait, None] = {}
        self._queues: dict[str, dict[_Wait, None]] = {}
        self._queued = 0
        self._sweeping = False

    async def enter(self, wait: _Wait) -> None:
        """Wait for a place. Raises GivenUpError when too many calls wait. Call leave() in any case."""
        self._queues.setdefault(wait.peer, {})[wait] = None
        self._queued += 1
        if not self._sweeping:
            self._sweeping = True
            self._sweep_later()
        self._fill()
        if self._queued > MAX_QUEUED:
            longest: dict[_Wait, None] = max(self._queues.values(), key=len)
            oldest = next(iter(longest))
            self._unqueue(oldest)
            oldest.give_up()
        await asyncio.wait((wait.turn, wait.given_up), return_when=asyncio.FIRST_COMPLETED)
        if wait.given_up.done():
            raise GivenUpError

    def leave(self, wait: _Wait) -> None:
        """Free the call's place, or remove the call from the queue."""
        if wait in self._taken:
            del self._taken[wait]
        elif wait in self._queues.get(wait.peer, ()):
            self._unqueue(wait)
        self._fill()

    def _fill(self) -> None:
        while self._queues and len(self._taken) < self._places:
            held = Counter(wait.peer for wait in self._taken)
            peer = min(self._queues, key=lambda one: held[one])
            wait = next(iter(self._queues[peer]))
            self._unqueue(wait)
            if peer in self._queues:
                # The connection goes behind all others with as many places.
                self._queues[peer] = self._queues.pop(peer)
            self._taken[wait] = None
            wait.turn.set_result(None)

    def _unqueue(self, wait: _Wait) -> None:
        queue = self._queues[wait.peer]
        del queue[wait]
        self._queued -= 1
        if not queue:
            del self._queues[wait.peer]

    def _sweep_later(self) -> None:
        asyncio.get_running_loop().call_later(_MOMENT.total_seconds(), self._sweep)

    def _sweep(self) -> None:
        self._sweeping = bool(self._taken)
        if not self._sweeping:
            return
        self._sweep_later()
        slow = [wait for wait in self._taken if wait.seen and not wait.given_up.done()]
        for wait in self._taken:
            wait.seen = True
        for _ in range(min(self._queued, len(slow) - self._places // 2)):
            held = Counter(wait.peer for wait in slow)
            oldest = next(wait for wait in slow if held[wait.peer] == max(held.values()))
            oldest.give_up()
            slow.remove(oldest)


class OneRequest(Interceptor):
    """Ends calls whose request does not arrive.

    The status is INVALID_ARGUMENT when the request is late or the client ends the call without one. It is
    RESOURCE_EXHAUSTED when the call has waited while too many others wait. Belongs before all interceptors that read
    requests.
    """

    def __init__(self, limit: timedelta, idle: timedelta, places: int, details: Details) -> None:
        """`limit`: maximum wait for a request, from the call's headers to the request's last byte.

        `idle`: maximum wait for each request of a call that streams requests.
        """
        self._limit = limit
        self._idle = idle
        self._places = Places(places)
        self._details = details
        self.unread = Unread(places // 4)
        """The refusals."""

    def wrap(self, handler: Handler, call: grpc.HandlerCallDetails) -> Handler:
        """Wrap the handler of a call."""
        handle = behavior_of(handler)

        # None of these uses gRPC's iterator, which keeps the last request for as long as the call lasts.
        async def unary(_: object, context: _Context) -> Any:
            try:
                return await handle(await self._first(context), context)
            except grpc.aio.AbortError as error:
                forget_frames(error)
                raise

        async def stream(_: object, context: _Context) -> None:
            # Not a generator: a cancel would not reach a generator that waits for its message to be sent. No variable
            # keeps the request: a stream lasts, and only its handler knows how long it needs the request.
            answering = handle(await self._first(context), context)
            if not hasattr(answering, "__aiter__"):
                await answering
                return
            async with aclosing(answering) as responses:
                async for response in responses:
                    await _write(context, response)

        async def each(context: _Context) -> AsyncIterator[Any]:
            while (request := await self._next(context, self._idle)) is not None:
                yield request

        async def many(_: object, context: _Context) -> Any:
            return await handle(each(context), context)

        behavior = many if handler.request_streaming else stream if handler.response_streaming else unary
        return with_behavior(handler, behavior, request_streaming=True)

    async def _first(self, context: _Context) -> Any:
        request = await self._next(context, self._limit)
        if request is None:
            message = "the call has ended without a request; send one"
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, message)
        return request

    async def _next(self, context: _Context, limit: timedelta) -> Any:
        """Return the next request, None when the client has sent all. Abort the call when the wait is too long."""
        wait = _Wait(context.peer())
        try:
            async with asyncio.timeout(limit.total_seconds()):
                await self._places.enter(wait)
                coming = asyncio.ensure_future(context.read())
                coming.add_done_callback(_ignore)
                # Not cancelled when it is late: gRPC continues the read until the call ends.
                await asyncio.wait((coming, wait.given_up), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise GivenUpError
            request = coming.result()
            return None if request is grpc.aio.EOF else request
        except GivenUpError:
            message = "too many calls wait for their requests; call again"
            await self._refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        except TimeoutError:
            message = f"no request has come within {limit.total_seconds():g} s"
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, message)
        finally:
            # Only after the refusal was sent: until then gRPC keeps what has arrived.
            self._places.leave(wait)

    async def _refuse(self, context: _Context, code: grpc.StatusCode, message: str) -> NoReturn:
        self.unread.add(context)
        done: Any = self.unread.remove
        context.add_done_callback(done)
        await refuse(context, code, message, self._details)


async def _write(context: _Context, response: Any) -> None:
    """Send a message. Raises CancelledError when the client has disconnected, also where gRPC raises InternalError."""
    try:
        await context.write(response)
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


def _ignore(coming: asyncio.Future[Any]) -> None:
    if not coming.cancelled():
        coming.exception()
