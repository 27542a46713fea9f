"""Seats: which of the worker's attempts generate now. There are as many as the engine has places in its batch.

An attempt takes a seat before its engine generates, and frees it afterwards. Where an interactive attempt finds none, a
background attempt is asked to pause: the youngest one, scheduled jobs first. It stops between two tokens, frees its
seat and waits for another. `background` seats are never taken from background attempts.

Attempts at items of a batch are background attempts, whatever the class of the batch: no job waits for a batch.

Who waits gets a seat by class, HIGH before STANDARD before BACKGROUND before SCHEDULED, and the older job first.
Interactive jobs come before all background attempts. So a job that has begun is not overtaken by younger ones of its
class, however often it pauses. Background attempts that have fewer seats than theirs get the next one before anybody
else.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from jobs.classes import class_of, is_background
from jobs.errors import EngineFailed
from llm_pb import internal_pb2
from services.gpu_worker.engines.engine import Output


class Seat:
    """The seat of one attempt, which may be waiting for it."""

    def __init__(self, seats: "Seats", request: internal_pb2.RunRequest, *, item: bool = False) -> None:
        """`item`: the attempt is at an item of a batch."""
        self.job_class: Final = class_of(request.job)
        self.background: Final = item or is_background(self.job_class)
        """Whether it is given to others who need one."""
        self.order: Final = (self.background, self.job_class, request.create_time.ToNanoseconds())
        """The order in which attempts get a seat. The last one is the first to pause."""
        self.taken = False
        self.leaving = False
        """Whether the attempt was asked to free it."""
        self.waiting = False
        self._seats = seats
        self._got = asyncio.Event()
        self._asked_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._interrupt: asyncio.Timeout | None = None

    def ask(self) -> bool:
        """Ask for a seat, and return whether one was free. Otherwise the attempt waits for one from now on."""
        self.waiting = True
        self._seats.settle()
        return self.taken

    async def wait(self, patience: float | None) -> None:
        """Wait for the seat that was asked for, for up to `patience` seconds. Raises TimeoutError after that."""
        try:
            async with asyncio.timeout(patience):
                await self._got.wait()
        except TimeoutError:
            # It may have become free in the same moment.
            if not self.taken:
                raise

    def give(self) -> None:
        """Give the attempt a free seat."""
        self.taken, self.waiting = True, False
        self._got.set()

    def free(self) -> None:
        """Free the seat, or give up the wait for one."""
        if self._timer is not None:
            self._timer.cancel()
        if self.leaving:
            self._seats.on_freed(time.monotonic() - self._asked_at)
        self.taken = self.waiting = self.leaving = False
        self._got.clear()
        self._seats.settle()

    def leave(self) -> None:
        """Ask the attempt to free its seat: it gets no output any more."""
        self.leaving, self._asked_at = True, time.monotonic()
        if self._interrupt is not None and not self._interrupt.expired():
            self._interrupt.reschedule(0)

    def leave_at(self, when: float) -> None:
        """Ask the attempt to free its seat at a time of the loop's clock."""
        self._timer = asyncio.get_running_loop().call_at(when, self.leave)

    async def next(self, outputs: AsyncGenerator[Output, None]) -> Output | None:
        """Return the engine's next output; None once the attempt is asked to free its seat.

        The generation has been closed then, or is to be closed by the caller. The engine may have generated a token
        that is not returned: it generates it again. Raises EngineFailed if the engine has no more output.
        """
        if self.leaving:
            return None
        try:
            # It ends with the wait for the engine, so that what the engine returned is published as a whole.
            async with (interrupt := asyncio.timeout(None)):
                self._interrupt = interrupt
                return await anext(outputs)
        except TimeoutError:
            if not interrupt.expired():
                raise
            return None
        except StopAsyncIteration:
            raise EngineFailed("the engine ended the output without a finish reason") from None
        finally:
            self._interrupt = None


class Demand:
    """The seats that a chunk of a batch wants: its activity takes one slot, and its items many seats."""

    def __init__(self) -> None:
        self.items = 1
        """Number of items that run or are to run at the same time."""


class Seats:
    """The seats of one worker, and the attempts that have or want one."""

    def __init__(self, total: int, background: int) -> None:
        """`background` is the number that background attempts keep. At least one is left for the others."""
        self.total: Final = total
        self._background: Final = min(background, total - 1)
        self.on_freed: Callable[[float], object] = lambda _: None
        """Called with the seconds after which an attempt has freed the seat that it was asked for."""
        self._attempts: set[Seat] = set()
        self._demands: set[Demand] = set()
        self._changed = asyncio.Event()

    @contextmanager
    def attempt(self, request: internal_pb2.RunRequest, *, item: bool = False) -> Iterator[Seat]:
        """Register an attempt while the context is open, then free its seat. `item` is as for Seat."""
        seat = Seat(self, request, item=item)
        self._attempts.add(seat)
        self.note_change()
        try:
            yield seat
        finally:
            self._attempts.remove(seat)
            seat.free()

    @contextmanager
    def chunk(self, demand: Demand) -> Iterator[None]:
        """Count the items of a chunk while the context is open, so that the worker takes no more than it has seats."""
        self._demands.add(demand)
        try:
            yield
        finally:
            self._demands.remove(demand)
            self.note_change()

    @property
    def in_use(self) -> int:
        """Number of attempts that do not wait for a seat. Those that wait for the model to load are among them."""
        return min(sum(not seat.waiting for seat in self._attempts), self.total)

    @property
    def taken(self) -> list[Seat]:
        """The seats that are taken."""
        return [seat for seat in self._attempts if seat.taken]

    def slots(self, *, background: bool) -> int:
        """Return how many activities of a kind the worker is to have, so that none comes to wait for a seat."""
        others = sum(seat.background != background for seat in self._attempts)
        if not background:
            return self.total - min(others, self._background)
        items = sum(max(demand.items - 1, 0) for demand in self._demands)
        return max(self.total - others, self._background) - items

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds. It is checked after each change of the attempts, and by note_change."""
        while not condition():
            await self._changed.wait()

    def note_change(self) -> None:
        """Make `until` check its conditions."""
        self._changed.set()
        self._changed = asyncio.Event()

    def settle(self) -> None:
        """Give free seats to attempts that wait, and ask as many attempts to pause as others need seats."""
        while (seat := self._next()) is not None:
            seat.give()
        taken = self.taken
        wanted = sum(not seat.background for seat in self._waiting) - sum(seat.leaving for seat in taken)
        staying = sorted((seat for seat in taken if seat.background and not seat.leaving), key=_order)
        for seat in reversed(staying[self._background :]):
            if wanted <= 0:
                break
            seat.leave()
            wanted -= 1
        self.note_change()

    @property
    def _waiting(self) -> list[Seat]:
        return [seat for seat in self._attempts if seat.waiting]

    def _next(self) -> Seat | None:
        """Return the attempt that gets the next free seat; None if none is free or wanted."""
        taken, waiting = self.taken, sorted(self._waiting, key=_order)
        if len(taken) >= self.total or not waiting:
            return None
        if sum(seat.background and not seat.leaving for seat in taken) < self._background:
            return next((seat for seat in waiting if seat.background), waiting[0])
        return waiting[0]


def _order(seat: Seat) -> tuple[bool, int, int]:
    return seat.order
