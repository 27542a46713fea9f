"""Places for calls that wait for their requests: few may ask for one concurrently, the others queue by connection."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

MAX_QUEUED: Final = 1000
"""Maximum number of calls that wait for a place."""
_MOMENT: Final = timedelta(milliseconds=100)
"""Time within which a request that has arrived is read."""


class GivenUpError(Exception):
    """The call has waited for its request, and other calls need its place."""


@dataclass(eq=False)
class Wait:
    """A call that waits for a request."""

    peer: str
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    given_up: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    seen: bool = False

    def give_up(self) -> None:
        """End the wait with GivenUpError."""
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
        self._taken: dict[Wait, None] = {}
        self._queues: dict[str, dict[Wait, None]] = {}
        self._queued = 0
        self._sweeping = False

    async def enter(self, wait: Wait) -> None:
        """Wait for a place. Raises GivenUpError when too many calls wait. Call leave() in any case."""
        self._queues.setdefault(wait.peer, {})[wait] = None
        self._queued += 1
        if not self._sweeping:
            self._sweeping = True
            self._sweep_later()
        self._fill()
        if self._queued > MAX_QUEUED:
            longest: dict[Wait, None] = max(self._queues.values(), key=len)
            oldest = next(iter(longest))
            self._unqueue(oldest)
            oldest.give_up()
        await asyncio.wait((wait.turn, wait.given_up), return_when=asyncio.FIRST_COMPLETED)
        if wait.given_up.done():
            raise GivenUpError

    def leave(self, wait: Wait) -> None:
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

    def _unqueue(self, wait: Wait) -> None:
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
