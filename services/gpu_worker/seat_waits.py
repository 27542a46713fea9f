"""How one attempt waits for its seat, before it generates and whenever it has paused."""

import asyncio
from datetime import timedelta
from typing import Final, Protocol

from temporalio import activity

from jobs.stages import PAUSED, QUEUED
from llm_pb import internal_pb2
from services.gpu_worker import spans
from services.gpu_worker.attempt import Attempt
from services.gpu_worker.seats import Seat

_MAX_PATIENCE: Final = timedelta(minutes=5)
_HANDED_OVER_OFTEN: Final = 100_000
"""Size of an output, in bytes, that is handed over every _MAX_PATIENCE. A larger one waits longer in proportion, so
that all hand-overs of a day write at most 29 MB."""
_RESERVE: Final = timedelta(seconds=2)
"""Maximum part of an attempt's time that is reserved to hand the job over before Temporal gives the attempt up."""


class NoSeat(Exception):
    """The attempt gives up its wait for a seat, and the job is handed over."""


class Waits(Protocol):
    """What an attempt does for its seat."""

    seat: Seat

    async def take_seat(self) -> None:
        """Take a seat, unless the attempt has one."""
        ...

    def pause(self) -> None:
        """Free the seat, for the attempt to take another one later."""
        ...


class SeatWaits:
    """The waits of one attempt for its seat."""

    def __init__(self, attempt: Attempt, seat: Seat, request: internal_pb2.RunRequest, patience: timedelta) -> None:
        """`patience` is the maximum wait for a seat, of an attempt at a job that was not handed over for a seat yet."""
        self.seat = seat
        self._attempt = attempt
        # A job that finds no seat anywhere must not fill its history with hand-overs.
        self._patience = patience * (1 + request.unseated)
        self._most = max(_MAX_PATIENCE, patience)
        self._has_waited = False
        self._hand_over_at: float | None = None
        if (limit := activity.info().start_to_close_timeout) is not None:
            self._hand_over_at = _now() + (limit - min(_RESERVE, limit / 10)).total_seconds()

    async def take_seat(self) -> None:
        """Take a seat, unless the attempt has one. Raises NoSeat after too long a wait.

        An attempt that has waited raises it, too, when its time is nearly up, because the job is not to blame for that.
        """
        if self.seat.taken:
            return
        if not self.seat.ask():
            await self._wait()
        if self._has_waited and self._hand_over_at is not None:
            self.seat.leave_at(self._hand_over_at)

    async def _wait(self) -> None:
        self._has_waited = True
        has_paused = self._attempt.times.pauses > 0
        await self._attempt.enter(PAUSED if has_paused else QUEUED)
        # A hand-over writes the output into the job's history, which Temporal ends at 50 MiB.
        most = self._most * (1 + self._attempt.output_bytes / _HANDED_OVER_OFTEN)
        patience = min(self._patience, most).total_seconds()
        if self._hand_over_at is not None:
            patience = min(patience, self._hand_over_at - _now())
        try:
            await self.seat.wait(max(patience, 0.0))
        except TimeoutError:
            raise NoSeat("the seats of the worker are taken by more urgent jobs") from None
        if has_paused:
            spans.describe_resumption()

    def pause(self) -> None:
        """Free the seat, for the attempt to take another one later. Raises NoSeat when its time is nearly up."""
        self._attempt.times.pauses += 1
        spans.describe_pause()
        self.seat.free()
        if self._hand_over_at is not None and _now() >= self._hand_over_at:
            raise NoSeat("the time of the attempt was spent on waits for a seat")


def _now() -> float:
    return asyncio.get_running_loop().time()
