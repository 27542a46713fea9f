"""When a chunk goes to another worker because its items cannot go on at this one."""

import time
from collections.abc import Collection

from jobs.errors import WorkerShutdown
from services.gpu_worker.batch.items import RunningItem
from services.gpu_worker.batch.stops import Stop
from services.gpu_worker.seats import Seat


class HandOver:
    """Decides for one attempt at a chunk."""

    def __init__(self, pause_seconds: float) -> None:
        """`pause_seconds` is the maximum time for which all items wait for seats."""
        self._pause_seconds = pause_seconds
        self._seated_at = time.monotonic()

    def due(self, running: Collection[RunningItem], asking: Seat | None, *, is_leaving: bool) -> Stop | None:
        """Return the stop if the chunk has to go to another worker now, None otherwise. Call it several times a second.

        `asking` is the seat for which the next item waits. `is_leaving`: the worker was asked to stop.
        """
        if is_leaving and running and all(item.attempt is None for item in running):
            # They wait for their next attempts, and have nothing to finish in the time of the grace.
            return Stop(WorkerShutdown("the worker was asked to stop"))
        now, seats = time.monotonic(), [item.seat for item in running]
        waiting = [seat for seat in (asking, *seats) if seat is not None and seat.waiting]
        if any(seat.taken for seat in seats) or not waiting:
            self._seated_at = now
        elif now - self._seated_at > self._pause_seconds:
            return Stop(WorkerShutdown("the seats of the worker are taken by more urgent jobs"))
        return None
