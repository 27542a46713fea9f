"""The slots of a ledger: see workflows.llm_ledger.

A pipeline that has failed may be submitted again under its id. It then has two reservations for a moment: the release
of the first one may arrive after the second one was made. Each has a number, so that a release frees what it was for
and a lease finds what it belongs to. Both count as one slot.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

from llm_pb import internal_pb2

_MAX_RELEASED: Final = 1000


class Slot(NamedTuple):
    """A reservation of a job."""

    reserved_at: datetime
    """When it was last reserved."""
    output_tokens: int
    """Number of output tokens that are reserved for the job."""
    settled: int = 0
    """Number of its output tokens that count as used already."""


class Slots:
    """The reservations of each job, and those that were released last."""

    def __init__(self, state: internal_pb2.LedgerState | None = None) -> None:
        self._of: dict[str, dict[int, Slot]] = {}
        """By workflow id and number. The job that was checked longest ago comes first."""
        self._released: dict[tuple[str, int], None] = {}
        for slot in state.slots if state else ():
            kept = Slot(slot.reserve_time.ToDatetime(UTC), slot.output_tokens, slot.settled_tokens)
            self._of.setdefault(slot.workflow_id, {})[slot.reservation] = kept
        for released in state.released if state else ():
            self._released[released.workflow_id, released.reservation] = None

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the workflow ids of the jobs with a slot."""
        return iter(self._of)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._of

    def get(self, id_: str, reservation: int) -> Slot | None:
        """Return a reservation; None if there is no such one."""
        return self._of.get(id_, {}).get(reservation)

    def reserve(self, id_: str, reservation: int, output_tokens: int, now: datetime) -> None:
        """Make a reservation. A repeated Submit reserves the tokens that the job has already."""
        slot = self.get(id_, reservation) or Slot(now, output_tokens)
        self.put(id_, reservation, slot._replace(reserved_at=now))
        self._released.pop((id_, reservation), None)

    def put(self, id_: str, reservation: int, slot: Slot) -> None:
        """Store a reservation, in place of the one of the same number."""
        self._of.setdefault(id_, {})[reservation] = slot

    def reserved_tokens(self) -> int:
        """Return the number of output tokens that are reserved for all jobs."""
        return sum(slot.output_tokens for of_job in self._of.values() for slot in of_job.values())

    def free(self, id_: str, reservation: int, used_tokens: int | None) -> int:
        """Free a reservation; return how many output tokens count as used from now on.

        Number 0 is from a version without numbers: all reservations of the job are freed, or its only one was made
        without a number. The job has used so many output tokens; None: it has used all that are reserved.
        """
        of_job = self._of.get(id_, {})
        freed = [*of_job] if not reservation else [reservation if reservation in of_job else 0]
        count = 0
        for number in freed:
            if (slot := of_job.pop(number, None)) is not None:
                # Of several, the last one is the job that was asked about.
                known = used_tokens is not None and number == freed[-1]
                count += max((used_tokens or 0) - slot.settled, 0) if known else slot.output_tokens
        if not of_job:
            self._of.pop(id_, None)
        return count

    def free_reserved_before(self, id_: str, before: datetime | None, used_tokens: int | None) -> int:
        """Free the reservations of a job that were last made at a time or earlier; return as free() does. None: all."""
        of_job = self._of.get(id_, {})
        old = [number for number, slot in of_job.items() if before is None or slot.reserved_at <= before]
        return sum(self.free(id_, number, used_tokens if number == old[-1] else None) for number in old)

    def move_to_end(self, id_: str) -> None:
        """Note that a job was checked."""
        if (of_job := self._of.pop(id_, None)) is not None:
            self._of[id_] = of_job

    def note_release(self, id_: str, reservation: int) -> None:
        """Remember that a reservation was released, so that a lease which arrives later does not make it again."""
        self._released[id_, reservation] = None
        if len(self._released) > _MAX_RELEASED:
            del self._released[next(iter(self._released))]

    def was_released(self, id_: str, reservation: int) -> bool:
        """Return whether a reservation was released recently."""
        return (id_, reservation) in self._released

    def save(self, state: internal_pb2.LedgerState) -> None:
        """Add the slots to the state with which the next run begins."""
        for id_, of_job in self._of.items():
            for reservation, slot in of_job.items():
                kept = state.slots.add(workflow_id=id_, output_tokens=slot.output_tokens, settled_tokens=slot.settled)
                kept.reservation = reservation
                kept.reserve_time.FromDatetime(slot.reserved_at)
        state.released.extend(
            internal_pb2.ReleasedSlot(workflow_id=id_, reservation=reservation) for id_, reservation in self._released
        )


def pairs(ids: Iterable[str], reservations: Iterable[int]) -> Iterator[tuple[str, int]]:
    """Return workflow ids, each with the number of its reservation: 0 where none is given."""
    numbers = [*reservations]
    for index, id_ in enumerate(ids):
        yield id_, numbers[index] if index < len(numbers) else 0
