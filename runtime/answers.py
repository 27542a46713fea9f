"""What the calls of a gRPC server hold in memory, from their requests until their clients have read the answers.

gRPC keeps an answer until the client's HTTP/2 window takes it, and a client decides when that is. So what a call holds
is counted, from before its answer is made to the moment at which the answer has left.

Nobody can have it all. A connection may take as much as the others have left free (the dynamic threshold of a switch's
shared buffer: Choudhury and Hahne, 1998): one that reads nothing gets about half of the budget, n of them n/(n+1), and
the next one as much as each of them. Nobody starves: MIN_MESSAGE_BYTES may be sent however full the budget is. Streams,
whose messages can be cut to any size, have an eighth of the budget for themselves and leave the rest to answers that
cannot be cut. So a server holds at most its budget, and that little for each call.

Requests have a budget of their own, half as large, for they are there before anything is known of their answers: who
waits for room holds his request meanwhile. A request does not wait itself: without room for it the call is refused.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

MIN_MESSAGE_BYTES: Final = 4096
"""What every message may have, however full the budget is."""
MAX_MESSAGE_BYTES: Final = 256 * 1024
"""Maximum of one message of a stream: a reader that is far behind catches up in several."""
MAKING_COPIES: Final = 4
"""How often an answer is in memory while it is made or its stream goes on: its parts, the message, its bytes and gRPC's
copy of these."""
SENDING_COPIES: Final = 2
"""How often the answer of a call that has returned is in memory: its bytes and gRPC's copy of these."""
WAIT: Final = timedelta(seconds=10)
"""Longest wait of an answer for room."""
SHORT_STALL: Final = timedelta(seconds=30)
"""The timeout of stalled() while others wait for what a client holds."""
_STALL_BYTES: Final = 2_000_000
"""What a client has to take in each timeout of stalled(): 2 MB at 70 kB/s, in SHORT_STALL."""
_MAX_TIMEOUTS: Final = 10
"""A message that is unread for so many timeouts is stalled, however much else the client takes. What one connection may
hold of 64 MiB is read in fewer."""
_SMALL: Final = MIN_MESSAGE_BYTES * MAKING_COPIES
_STREAMS_SHARE: Final = 8
"""Streams have the budget divided by this."""

Context = Any
"""A grpc.aio.ServicerContext, known by its identity."""


class NoRoomError(Exception):
    """The budget has no room for a request, or has had none for an answer for as long as a call may wait."""


class TooManyCallsError(Exception):
    """The server has as many calls as it takes."""


@dataclass(eq=False)
class _Connection:
    """What the server knows of one connection that has calls."""

    peer: str
    calls: int = 0
    unread: int = 0
    """Messages that gRPC has and the client has not taken."""
    moved_at: float = 0.0
    """When the client last took a message, or the first of the unread ones was made, by the loop's clock."""
    sent_bytes: int = 0
    """Bytes of all messages that gRPC has had."""
    taken_bytes: int = 0
    """Those of the messages that the client has taken."""


@dataclass(eq=False)
class _Pool:
    """Bytes that are shared."""

    size: int
    held: int = 0
    held_by: Counter[_Connection] = field(default_factory=Counter)

    def room(self, connection: _Connection) -> int:
        """Return how much more a connection may hold."""
        return self.size - self.held - self.held_by[connection]

    def add(self, connection: _Connection, more: int) -> None:
        """Count so many bytes more, or less."""
        self.held += more
        self.held_by[connection] += more
        if not self.held_by[connection]:
            del self.held_by[connection]


class Answers:
    """The calls of one server. Belongs to one event loop."""

    def __init__(self, max_calls: int, budget_bytes: int) -> None:
        self._max_calls = max_calls
        self.requests = _Pool(budget_bytes // 2)
        self.streams = _Pool(budget_bytes // _STREAMS_SHARE)
        self.others = _Pool(budget_bytes - self.streams.size)
        self._answers: dict[Context, Answer] = {}
        self._connections: dict[str, _Connection] = {}
        # By connection, and in the order in which they came.
        self._waiting: dict[_Connection, dict[_Waiter, None]] = {}

    @property
    def held_bytes(self) -> int:
        """What all calls hold of answers."""
        return self.streams.held + self.others.held

    def open(self, context: Context, *, stream: bool = False) -> "Answer":
        """Begin to count a call, until gRPC is done with it. Raises TooManyCallsError."""
        if len(self._answers) >= self._max_calls:
            raise TooManyCallsError
        peer = context.peer()
        connection = self._connections.setdefault(peer, _Connection(peer))
        connection.calls += 1
        answer = self._answers[context] = Answer(self, self.streams if stream else self.others, connection)
        # Runs when the last byte has left, and when the client has.
        context.add_done_callback(self._close)
        return answer

    def of(self, context: Context) -> "Answer":
        """Return the answer of an open call."""
        return self._answers[context]

    def stalled(self, timeout: timedelta) -> set[str]:
        """Return the peers that have taken none of their unread messages for the timeout, or one of them too slowly.

        A message may be unread for the timeout, and as long again for each 2 MB of other messages that the connection
        had to carry meanwhile: HTTP/2 sends them side by side, and gRPC does not say how far it is with one. Taking
        small messages does not excuse leaving a large one. After ten timeouts nothing does.

        SHORT_STALL, when it is shorter, is the timeout of those that hold more than everybody may while calls wait for
        room, and of all while no more calls are taken.
        """
        now = asyncio.get_running_loop().time()
        full = len(self._answers) >= self._max_calls
        found = set()
        for answer in self._answers.values():
            if (unread := answer.unread) is None:
                continue
            one = answer.connection
            short = full or (self._waiting and self.others.held_by[one] > _SMALL)
            seconds = (min(SHORT_STALL, timeout) if short else timeout).total_seconds()
            others = one.sent_bytes - unread.taken_before - unread.size
            time_of_one = seconds * min(1 + others / _STALL_BYTES, _MAX_TIMEOUTS)
            if now - one.moved_at > seconds or now - unread.since > time_of_one:
                found.add(one.peer)
        return found

    def _close(self, context: Context) -> None:
        answer = self._answers.pop(context)
        answer.left()
        connection = answer.connection
        connection.calls -= 1
        if not connection.calls:
            del self._connections[connection.peer]

    def hold(self, answer: "Answer", size: int) -> None:
        """Count so many bytes for a call, instead of what it held, and give to those that wait what is left."""
        more = size - answer.held
        answer.held = size
        answer.pool.add(answer.connection, more)
        # No message of a stream waits for room.
        if more < 0 and answer.pool is self.others:
            self._share()

    def _share(self) -> None:
        """Let in those that wait and fit, those first whose connection holds least, on each in their order."""
        if not self._waiting or self.others.held >= self.others.size:
            return
        for connection in sorted(self._waiting, key=lambda one: self.others.held_by[one]):
            if self.others.room(connection) <= 0:
                # Nor is there any for the others, which hold more.
                return
            for waiter in self._waiting[connection]:
                if not self._let_in(waiter):
                    break

    def _let_in(self, waiter: "_Waiter") -> bool:
        """Return whether a call waits no more."""
        if waiter.let_in.done():
            return True
        if not waiter.answer.fits(waiter.size):
            return False
        # More, never less: nobody else is let in by this.
        self.hold(waiter.answer, waiter.size)
        waiter.let_in.set_result(None)
        return True

    async def reserve(self, answer: "Answer", size: int) -> None:
        """Hold so many bytes for a call as soon as they fit. Raises NoRoomError."""
        # What is larger than all there is comes alone.
        size = min(size, answer.pool.size)
        if answer.fits(size):
            self.hold(answer, size)
            return
        waiter = _Waiter(answer, size, asyncio.get_running_loop().create_future())
        waiting = self._waiting.setdefault(answer.connection, {})
        waiting[waiter] = None
        try:
            async with asyncio.timeout(WAIT.total_seconds()):
                await waiter.let_in
        except TimeoutError as error:
            raise NoRoomError from error
        finally:
            waiter.let_in.cancel()
            del waiting[waiter]
            if not waiting:
                del self._waiting[answer.connection]


class Answer:
    """What one call holds. A call sends one message after the other."""

    def __init__(self, answers: Answers, pool: _Pool, connection: _Connection) -> None:
        self._answers = answers
        self.pool = pool
        self.connection = connection
        self.held = 0
        self.unread: _Unread | None = None
        """The message that gRPC has and the client has not taken."""

    @contextmanager
    def request(self, size: int) -> Iterator[None]:
        """Count the call's request, of so many bytes, while the context is open. Raises NoRoomError at once."""
        pool = self._answers.requests
        # What is larger than all there is comes alone.
        if min(size, pool.size) > max(pool.room(self.connection), MIN_MESSAGE_BYTES):
            raise NoRoomError
        pool.add(self.connection, size)
        try:
            yield
        finally:
            pool.add(self.connection, -size)

    def room(self) -> int:
        """Return the maximum size, in bytes, of the stream's next message. Never too small for one to be sent."""
        room = self.pool.room(self.connection) // MAKING_COPIES
        return min(max(room, MIN_MESSAGE_BYTES), MAX_MESSAGE_BYTES)

    def fits(self, size: int) -> bool:
        """Return whether the call may hold so many bytes, instead of what it holds."""
        return size <= max(self.pool.room(self.connection) + 2 * self.held, _SMALL)

    async def reserve(self, size: int) -> None:
        """Make room for an answer of at most so many bytes, before it is made; replaces what was reserved before.

        Waits a few seconds for others to be read. Raises NoRoomError when that was not enough.
        """
        await self._answers.reserve(self, size * MAKING_COPIES)

    def sending(self, size: int, copies: int = MAKING_COPIES) -> None:
        """Count a message of so many bytes, which goes to gRPC now, instead of what was reserved."""
        self._answers.hold(self, size * copies)
        now = asyncio.get_running_loop().time()
        one = self.connection
        if not one.unread:
            one.moved_at = now
        one.unread += 1
        one.sent_bytes += size
        self.unread = _Unread(size, now, one.taken_bytes)

    def left(self) -> None:
        """Count nothing more: gRPC has sent the message, or the call is over."""
        self._answers.hold(self, 0)
        if self.unread is not None:
            one = self.connection
            one.unread -= 1
            one.taken_bytes += self.unread.size
            one.moved_at = asyncio.get_running_loop().time()
            self.unread = None


@dataclass
class _Unread:
    size: int
    since: float
    """When it was made, by the loop's clock."""
    taken_before: int
    """What the client had taken of the connection by then, in bytes."""


@dataclass(eq=False)
class _Waiter:
    answer: Answer
    size: int
    let_in: "asyncio.Future[None]"
