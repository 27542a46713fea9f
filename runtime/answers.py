"""Memory that the calls of a gRPC server hold, from their requests until their clients have read the answers.

gRPC keeps an answer until the client's HTTP/2 window accepts it, and the client decides when that is. So the memory of
a call is counted from before its answer is produced until the answer has been sent.

No connection gets the whole budget. A connection may hold as many bytes as are still free (the dynamic threshold of a
switch's shared buffer: Choudhury and Hahne, 1998). One connection that reads nothing gets about half of the budget. n
such connections get n/(n+1) of it, and the next one gets as much as each of them. No call starves: it may send
MIN_MESSAGE_BYTES however full the budget is. Streams, whose messages can be split at any size, have an eighth of the
budget for themselves. They leave the rest to answers that cannot be split. So a server holds at most its budget, and
the minimum for each call.

Requests have a separate budget, half as large, because the size of an answer is unknown when its request arrives. A
call that waits for room holds its request meanwhile. A request does not wait: without room for it the call is refused.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

MIN_MESSAGE_BYTES: Final = 4096
"""Size that every message may have, however full the budget is."""
MAX_MESSAGE_BYTES: Final = 256 * 1024
"""Maximum size of a message of a stream. A reader that is far behind catches up in several messages."""
MAKING_COPIES: Final = 4
"""Copies of an answer in memory while it is produced or its stream lasts: its parts, the message, its bytes and gRPC's
copy of these."""
SENDING_COPIES: Final = 2
"""Copies of an answer in memory after its call has returned: its bytes and gRPC's copy of these."""
WAIT: Final = timedelta(seconds=10)
"""Maximum wait of an answer for room."""
SHORT_STALL: Final = timedelta(seconds=30)
"""Timeout of stalled() while other calls wait for room that a client holds."""
_STALL_BYTES: Final = 2_000_000
"""Bytes that a client has to read in each timeout of stalled(): 2 MB in SHORT_STALL are 70 kB/s."""
_MAX_TIMEOUTS: Final = 10
"""Timeouts after which an unread message is stalled, however much else the client reads. With a budget of 64 MiB a
client needs fewer to read all that its connection may hold."""
_SMALL: Final = MIN_MESSAGE_BYTES * MAKING_COPIES
_STREAMS_SHARE: Final = 8
"""Streams get the budget divided by this number."""

Context = Any
"""A grpc.aio.ServicerContext, compared by identity."""


class NoRoomError(Exception):
    """The budget has no room for a request, or had none for an answer within WAIT."""


class TooManyCallsError(Exception):
    """The server has the maximum number of calls."""


@dataclass(eq=False)
class _Connection:
    """What the server knows of one connection that has calls."""

    peer: str
    calls: int = 0
    unread: int = 0
    """Number of messages that gRPC holds and the client has not read."""
    moved_at: float = 0.0
    """Time by the loop's clock when the client last read a message, or when the first unread one was sent."""
    sent_bytes: int = 0
    """Bytes of all messages that were passed to gRPC."""
    taken_bytes: int = 0
    """Bytes of the messages that the client has read."""


@dataclass(eq=False)
class _Pool:
    """A budget of bytes that connections share."""

    size: int
    held: int = 0
    held_by: dict[_Connection, int] = field(default_factory=dict)

    def room(self, connection: _Connection) -> int:
        """Return how many more bytes a connection may hold."""
        return self.size - self.held - self.held_by.get(connection, 0)

    def add(self, connection: _Connection, more: int) -> None:
        """Add bytes to the connection's count; a negative number subtracts them."""
        self.held += more
        if held := self.held_by.get(connection, 0) + more:
            self.held_by[connection] = held
        else:
            self.held_by.pop(connection, None)


class Answers:
    """The calls of one server. Belongs to one event loop."""

    def __init__(self, max_calls: int, budget_bytes: int) -> None:
        self._max_calls = max_calls
        self.requests = _Pool(budget_bytes // 2)
        self.streams = _Pool(budget_bytes // _STREAMS_SHARE)
        self.others = _Pool(budget_bytes - self.streams.size)
        self._answers: dict[Context, Answer] = {}
        self._connections: dict[str, _Connection] = {}
        # By connection, each in order of arrival.
        self._waiting: dict[_Connection, dict[_Waiter, None]] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of answers that all calls hold."""
        return self.streams.held + self.others.held

    def open(self, context: Context, *, stream: bool = False) -> "Answer":
        """Count a call from now until gRPC has finished with it. Raises TooManyCallsError."""
        if len(self._answers) >= self._max_calls:
            raise TooManyCallsError
        peer = context.peer()
        connection = self._connections.setdefault(peer, _Connection(peer))
        connection.calls += 1
        answer = self._answers[context] = Answer(self, self.streams if stream else self.others, connection)
        # Runs when the last byte has been sent, and when the client has disconnected.
        context.add_done_callback(self._close)
        return answer

    def of(self, context: Context) -> "Answer":
        """Return the answer of an open call."""
        return self._answers[context]

    def stalled(self, timeout: timedelta) -> set[str]:
        """Return the peers that have read none of their unread messages for the timeout, or read one too slowly.

        A message may stay unread for the timeout, and as long again for each 2 MB of other messages that the connection
        had to carry meanwhile: HTTP/2 interleaves them, and gRPC does not report the progress of one. A client that
        reads small messages may still not leave a large one unread. After ten timeouts a message is stalled in any
        case.

        SHORT_STALL applies where it is shorter than the timeout. While calls wait for room it applies to connections
        that hold more than the minimum. While the server has the maximum number of calls it applies to all connections.
        """
        now = asyncio.get_running_loop().time()
        full = len(self._answers) >= self._max_calls
        found = set()
        for answer in self._answers.values():
            if (unread := answer.unread) is None:
                continue
            one = answer.connection
            short = full or (self._waiting and self.others.held_by.get(one, 0) > _SMALL)
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
        """Set the bytes that a call holds, and give what becomes free to waiting calls."""
        # No message of a stream waits for room.
        if self._count(answer, size) < 0 and answer.pool is self.others:
            while self._admit_those_that_fit():
                pass

    def _count(self, answer: "Answer", size: int) -> int:
        """Set the bytes that a call holds; return by how many they grew."""
        more = size - answer.held
        answer.held = size
        answer.pool.add(answer.connection, more)
        return more

    def _admit_those_that_fit(self) -> bool:
        """Admit waiting calls; return whether one of them holds less than before, so that others may fit.

        Connections that hold least come first. The calls of one connection keep their order.
        """
        freed = False
        if not self._waiting or self.others.held >= self.others.size:
            return freed
        for connection in sorted(self._waiting, key=lambda one: self.others.held_by.get(one, 0)):
            if self.others.room(connection) <= 0:
                # The other connections hold more, so they have no room either.
                break
            for waiter in self._waiting[connection]:
                if waiter.admitted.done():
                    continue
                if not waiter.answer.fits(waiter.size):
                    break
                waiter.admitted.set_result(None)
                freed |= self._count(waiter.answer, waiter.size) < 0
        return freed

    async def reserve(self, answer: "Answer", size: int) -> None:
        """Wait until the bytes fit, then count them for the call. Raises NoRoomError."""
        # A size above the whole budget is admitted when the budget is empty.
        size = min(size, answer.pool.size)
        if answer.fits(size):
            self.hold(answer, size)
            return
        waiter = _Waiter(answer, size, asyncio.get_running_loop().create_future())
        waiting = self._waiting.setdefault(answer.connection, {})
        waiting[waiter] = None
        try:
            async with asyncio.timeout(WAIT.total_seconds()):
                await waiter.admitted
        except TimeoutError as error:
            raise NoRoomError from error
        finally:
            waiter.admitted.cancel()
            del waiting[waiter]
            if not waiting:
                del self._waiting[answer.connection]


class Answer:
    """The memory of one call. A call sends one message after the other."""

    def __init__(self, answers: Answers, pool: _Pool, connection: _Connection) -> None:
        self._answers = answers
        self.pool = pool
        self.connection = connection
        self.held = 0
        self.unread: _Unread | None = None
        """The message that gRPC holds and the client has not read."""

    @contextmanager
    def request(self, size: int) -> Iterator[None]:
        """Count a request of `size` bytes while the context is open. Raises NoRoomError without waiting."""
        pool = self._answers.requests
        # A size above the whole budget is admitted when the budget is empty.
        if min(size, pool.size) > max(pool.room(self.connection), MIN_MESSAGE_BYTES):
            raise NoRoomError
        pool.add(self.connection, size)
        try:
            yield
        finally:
            pool.add(self.connection, -size)

    def room(self) -> int:
        """Return the maximum size, in bytes, of the stream's next message: at least MIN_MESSAGE_BYTES."""
        room = self.pool.room(self.connection) // MAKING_COPIES
        return min(max(room, MIN_MESSAGE_BYTES), MAX_MESSAGE_BYTES)

    def fits(self, size: int) -> bool:
        """Return whether the call may hold `size` bytes in place of those that it holds."""
        return size <= max(self.pool.room(self.connection) + 2 * self.held, _SMALL)

    async def reserve(self, size: int) -> None:
        """Reserve room for an answer of at most `size` bytes before it is produced; replaces the last reservation.

        Waits a few seconds until clients have read other answers. Raises NoRoomError when there is still no room.
        """
        await self._answers.reserve(self, size * MAKING_COPIES)

    def sending(self, size: int, copies: int = MAKING_COPIES) -> None:
        """Count a message of `size` bytes that is passed to gRPC now; replaces the reservation."""
        self._answers.hold(self, size * copies)
        now = asyncio.get_running_loop().time()
        one = self.connection
        if not one.unread:
            one.moved_at = now
        one.unread += 1
        one.sent_bytes += size
        self.unread = _Unread(size, now, one.taken_bytes)

    def left(self) -> None:
        """Stop counting: gRPC has sent the message, or the call is over."""
        self._answers.hold(self, 0)
        if self.unread is not None:
            one = self.connection
            one.unread -= 1
            one.taken_bytes += self.unread.size
            one.moved_at = asyncio.get_running_loop().time()
            self.unread = None


@dataclass(slots=True)
class _Unread:
    size: int
    since: float
    """Time by the loop's clock when it was passed to gRPC."""
    taken_before: int
    """Bytes that the client had read from the connection by then."""


@dataclass(eq=False)
class _Waiter:
    answer: Answer
    size: int
    admitted: "asyncio.Future[None]"
