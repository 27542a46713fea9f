"""The slots of a ledger: see workflows.llm_ledger.

A slot is bound to a workflow id. What is started once has one reservation of it, however often its Submit is repeated.
A pipeline that has failed may be submitted again under its id. So each Submit of a pipeline makes a reservation of its
own, which the run that it starts releases. Together they are one slot, which is free without a reservation:

- A late Release of the run that has failed finds that run's reservation gone, and the next run's stays.
- Of two gateways that submit a pipeline at the same time one starts it. The other one releases its own reservation.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

from llm_pb import internal_pb2

_MAX_RELEASED: Final = 1000


class Slot(NamedTuple):
    """A reservation of a slot."""

    reserved_at: datetime
    """When it was last made."""
    output_tokens: int
    """Number of output tokens that are reserved for the job."""
    settled: int = 0
    """Number of its output tokens that count as used already."""


class Slots:
    """The slots in use, and the reservations that were released last in this run of the ledger."""

    def __init__(self, state: internal_pb2.LedgerState | None = None) -> None:
        self._of: dict[str, dict[int, Slot]] = {}
        """By workflow id and reservation. The job that was checked longest ago comes first."""
        self._released: dict[tuple[str, int], None] = {}
        """Those of batches and pipelines."""
        for slot in state.slots if state else ():
            kept = Slot(slot.reserve_time.ToDatetime(UTC), slot.output_tokens, slot.settled_tokens)
            self._of.setdefault(slot.workflow_id, {})[slot.reservation] = kept

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the workflow ids of the jobs with a slot."""
        return iter(self._of)

    def reserved_tokens(self) -> int:
        """Return the number of output tokens that are reserved. Reservations of one slot are for the same tokens."""
        return sum(max(slot.output_tokens for slot in of_job.values()) for of_job in self._of.values())

    def get(self, id_: str, reservation: int) -> Slot | None:
        """Return a reservation, or else the one without a number: a gateway of an earlier version has made it."""
        of_job = self._of.get(id_, {})
        return of_job.get(reservation) or of_job.get(0)

    def put(self, id_: str, reservation: int, slot: Slot) -> None:
        """Store what get() returns from now on."""
        of_job = self._of.setdefault(id_, {})
        of_job[0 if reservation not in of_job and 0 in of_job else reservation] = slot

    def reserve(self, id_: str, reservation: int, output_tokens: int, now: datetime) -> None:
        """Make a reservation. One that is made again keeps its tokens."""
        of_job = self._of.setdefault(id_, {})
        of_job[reservation] = of_job.get(reservation, Slot(now, output_tokens))._replace(reserved_at=now)
        self._released.pop((id_, reservation), None)

    def free(self, id_: str, reservation: int, used_tokens: int | None) -> int:
        """Free a reservation, or all for 0. Return how many output tokens count as used from now on.

        `used_tokens` is what the job has used; None: all that are reserved. A reservation that is unknown was made
        without a number, or is gone.
        """
        of_job = self._of.get(id_, {})
        numbers = ([reservation] if reservation in of_job else [0]) if reservation else [*of_job]
        freed = [of_job.pop(number) for number in numbers if number in of_job]
        if not of_job:
            self._of.pop(id_, None)
        if not freed:
            return 0
        if used_tokens is None:
            return max(slot.output_tokens for slot in freed)
        return max(used_tokens - max(slot.settled for slot in freed), 0)

    def free_unstarted(self, id_: str, before: datetime) -> None:
        """Free the reservations of a job that were last made before a time: nothing was started with them."""
        for reservation, slot in [*self._of.get(id_, {}).items()]:
            if slot.reserved_at <= before:
                del self._of[id_][reservation]
        if not self._of.get(id_, True):
            del self._of[id_]

    def move_to_end(self, id_: str) -> None:
        """Note that a job was checked."""
        if (of_job := self._of.pop(id_, None)) is not None:
            self._of[id_] = of_job

    def note_release(self, id_: str, reservation: int) -> None:
        """Remember a release, so that a lease which comes later does not make the reservation again."""
        self._released[id_, reservation] = None
        if len(self._released) > _MAX_RELEASED:
            del self._released[next(iter(self._released))]

    def was_released(self, id_: str, reservation: int) -> bool:
        """Return whether a reservation was released lately, and not made since."""
        return (id_, reservation) in self._released

    def save(self, state: internal_pb2.LedgerState) -> None:
        """Add the slots to the state with which the next run begins."""
        for id_, of_job in self._of.items():
            for reservation, slot in of_job.items():
                kept = state.slots.add(workflow_id=id_, output_tokens=slot.output_tokens, settled_tokens=slot.settled)
                kept.reservation = reservation
                kept.reserve_time.FromDatetime(slot.reserved_at)
