"""The reservations of a ledger's slots: see workflows.ledger_slots."""

from datetime import UTC, datetime, timedelta

import pytest

from llm_pb import internal_pb2
from workflows.ledger_slots import Slots

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=90)


@pytest.fixture
def slots() -> Slots:
    """The slot of a pipeline that was submitted again before the Release of its first run."""
    slots = Slots()
    slots.reserve("pipeline", 1, 10, NOW)
    slots.reserve("pipeline", 2, 10, LATER)
    return slots


def test_reservations_of_a_job_are_one_slot_and_its_tokens_count_once(slots: Slots) -> None:
    slots.reserve("job", 0, 5, NOW)
    assert (len(slots), slots.reserved_tokens()) == (2, 15)


def test_a_release_frees_what_it_was_for(slots: Slots) -> None:
    assert slots.free("pipeline", 1, 4) == 4
    assert slots.free("pipeline", 1, 4) == 0
    assert (len(slots), slots.reserved_tokens()) == (1, 10)
    assert slots.free("pipeline", 2, None) == 10
    assert not len(slots)


def test_a_release_without_a_number_frees_all(slots: Slots) -> None:
    """It is of a pipeline that a gateway of an earlier version has started."""
    assert slots.free("pipeline", 0, 4) == 4
    assert not len(slots)


def test_what_was_reserved_without_a_number_is_freed_with_one() -> None:
    slots = Slots()
    slots.reserve("pipeline", 0, 10, NOW)
    assert slots.free("pipeline", 1, 4) == 4
    assert not len(slots)


def test_only_reservations_whose_start_cannot_be_under_way_are_freed_unstarted(slots: Slots) -> None:
    slots.free_unstarted("pipeline", NOW)
    assert slots.free("pipeline", 1, 4) == 0
    slots.free_unstarted("pipeline", LATER)
    slots.free_unstarted("pipeline", LATER)
    assert not len(slots)


def test_the_next_run_of_a_ledger_knows_the_reservations(slots: Slots) -> None:
    state = internal_pb2.LedgerState()
    slots.save(state)
    known = Slots(state)
    known.free("pipeline", 1, 4)
    assert [*known] == ["pipeline"]
    known.free_unstarted("pipeline", NOW)
    assert [*known] == ["pipeline"]
