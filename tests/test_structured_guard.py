"""Which generation has to end, and that an honest engine's never has to, however slow its machine is."""

from contextlib import ExitStack

import pytest

from services.gpu_worker.structured_guard import Member, StructuredGuard


class Batch:
    """A guard, the clock it sees, and generations that decode."""

    def __init__(self, best: float = 0.01, **options: float) -> None:
        self.now = 0.0
        self.guard = StructuredGuard(**options, clock=lambda: self.now)
        self._open = ExitStack()
        with self.guard.member("pace", structured=False) as member:
            member.decoding = True
            self.steps(20, best)

    def member(self, request_id: str, *, structured: bool = True, decoding: bool = True) -> Member:
        member = self._open.enter_context(self.guard.member(request_id, structured=structured))
        member.decoding = decoding
        return member

    def steps(self, count: int, seconds: float) -> list[str]:
        """Return who was ended during so many steps of so many seconds."""
        ended = []
        for _ in range(count):
            self.now += seconds
            if (member := self.guard.step()) is not None:
                assert member.ended
                ended.append(member.request_id)
        return ended


def test_the_newest_is_ended_first_and_only_structured_ones() -> None:
    batch = Batch()
    for name in ("a", "b"):
        batch.member(name)
    batch.member("free text", structured=False)
    assert batch.steps(100, 2) == ["b", "a"]


def test_none_is_ended_once_the_batch_is_fast_again() -> None:
    batch = Batch()
    for name in ("a", "b", "c"):
        batch.member(name)
    assert batch.steps(6, 2) == ["c"]
    assert batch.steps(10_000, 0.02) == []


@pytest.mark.parametrize("best", [0.001, 0.01, 0.1, 1, 10])
def test_a_slow_machine_is_no_reason(best: float) -> None:
    """Nor one that full batches and other processes make ten times as slow as it was at first."""
    batch = Batch(best)
    batch.member("a")
    assert batch.steps(1000, best * 10) == []


def test_a_fast_engine_may_be_slower_than_at_its_best_as_long_as_it_makes_a_token_a_second() -> None:
    batch = Batch(0.001)
    batch.member("a")
    assert batch.steps(1000, 0.9) == []


def test_an_engine_whose_best_is_not_known_ends_nothing() -> None:
    batch = Batch()
    batch.guard.best = float("inf")
    batch.member("a")
    assert batch.steps(5, 60) == []


def test_reading_prompts_is_no_reason() -> None:
    batch = Batch()
    batch.member("a")
    new = batch.member("new", structured=False, decoding=False)
    assert batch.steps(100, 5) == []
    new.decoding = True
    assert batch.steps(10, 5) == ["a"]


def test_an_idle_engine_is_no_slow_one() -> None:
    batch = Batch()
    with batch.guard.member("a", structured=True) as member:
        member.decoding = True
        batch.steps(20, 0.01)
    for number in range(20):
        batch.now += 600
        with batch.guard.member(f"b{number}", structured=True) as member:
            assert batch.steps(1, 0.01) == []
            member.decoding = True
            assert batch.steps(20, 0.01) == []


def test_single_slow_steps_are_no_reason() -> None:
    batch = Batch()
    batch.member("a")
    for _ in range(50):
        assert batch.steps(1, 15) == []
        assert batch.steps(20, 0.01) == []


def test_a_step_that_does_not_end_is_a_reason() -> None:
    batch = Batch()
    for name in ("a", "b"):
        batch.member(name)
    batch.steps(20, 0.01)
    ended = []
    for _ in range(100):
        batch.now += 0.5
        ended += [member.request_id for member in (batch.guard.check(),) if member is not None]
    assert ended == ["b", "a"]


def test_it_can_be_turned_off() -> None:
    batch = Batch(floor=0)
    batch.member("a")
    assert batch.steps(1000, 100) == []
