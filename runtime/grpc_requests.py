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
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NoReturn

import grpc

from runtime.grpc_interceptor import Details, Handler, Interceptor, behavior_of, refuse, with_behavior
from runtime.request_places import GivenUpError, Places, Wait
from runtime.tracebacks import forget_frames

_Context = grpc.aio.ServicerContext[Any, Any]
_LATE: Final = 2
_STALLED: Final = 10


class RequestLateError(Exception):
    """The next request of a call has not come in time. The call has to end with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


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
class Ending:
    """Whether a streaming call is to end early, and why.

    Its task must not be cancelled while it sends: gRPC takes no status then, and the call would stay for ever.
    """

    sending: bool = False
    """Whether gRPC has a message of the call that has not left."""
    error: Exception | None = None
    """What the call ends with when that message has left."""


ENDING: Final[ContextVar[Ending | None]] = ContextVar("ending", default=None)
"""How the call that is being handled may be ended by others. None: it may not."""


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
            # A method may read its requests in a task of its own, and end the call meanwhile. So this one does not.
            while (request := await self._next(context, self._idle)) is not None:
                yield request

        async def many(_: object, context: _Context) -> Any:
            try:
                return await handle(each(context), context)
            except RequestLateError as error:
                await self._refuse(context, error)

        behavior = many if handler.request_streaming else stream if handler.response_streaming else unary
        return with_behavior(handler, behavior, request_streaming=True)

    async def _first(self, context: _Context) -> Any:
        try:
            request = await self._next(context, self._limit)
            if request is None:
                message = "the call has ended without a request; send one"
                raise RequestLateError(grpc.StatusCode.INVALID_ARGUMENT, message)
        except RequestLateError as error:
            await self._refuse(context, error)
        return request

    async def _next(self, context: _Context, limit: timedelta) -> Any:
        """Return the next request, None when the client has sent all. Raises RequestLateError."""
        wait = Wait(context.peer())
        late = False
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
            late = True
            message = "too many calls wait for their requests; call again"
            raise RequestLateError(grpc.StatusCode.RESOURCE_EXHAUSTED, message) from None
        except TimeoutError:
            late = True
            message = f"no request has come within {limit.total_seconds():g} s"
            raise RequestLateError(grpc.StatusCode.INVALID_ARGUMENT, message) from None
        finally:
            if late:
                # Only once the call is over: until then gRPC keeps what has arrived.
                leave: Any = lambda _: self._places.leave(wait)  # noqa: E731
                context.add_done_callback(leave)
            else:
                self._places.leave(wait)

    async def _refuse(self, context: _Context, error: RequestLateError) -> NoReturn:
        self.unread.add(context)
        done: Any = self.unread.remove
        context.add_done_callback(done)
        await refuse(context, error.code, str(error), self._details)


async def _write(context: _Context, response: Any) -> None:
    """Send a message. Raises CancelledError when the client has disconnected, also where gRPC raises InternalError.

    Raises the error that the call has to end with, once the message has left.
    """
    ending = ENDING.get()
    if ending is None:
        await _send(context, response)
        return
    ending.sending = True
    try:
        await _send(context, response)
    finally:
        ending.sending = False
    if ending.error is not None:
        raise ending.error


async def _send(context: _Context, response: Any) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


def _ignore(coming: asyncio.Future[Any]) -> None:
    if not coming.cancelled():
        coming.exception()
