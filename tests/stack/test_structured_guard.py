"""The guard ends generations that slow the batch, and none of an engine that is slow for other reasons."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from services.gpu_worker.engines.structured_guard import FLOOR, Member, StructuredGuard


class Batch:
    """A guard with a fake clock, and generations that decode."""

    def __init__(self, best: float = 0.01, token_seconds: float = 0.0001, floor: float = FLOOR) -> None:
        self.now = 0.0
        self.guard = StructuredGuard(floor, clock=lambda: self.now)
        self.guard.token_seconds, self.guard.max_step_tokens = token_seconds, 2048
        self._open = ExitStack()
        with self.guard.member("pace", structured=False) as member:
            member.decoding = True
            self.steps(20, best)

    def member(self, request_id: str, *, structured: bool = True, decoding: bool = True) -> Member:
        member = self._open.enter_context(self.guard.member(request_id, structured=structured))
        member.decoding = decoding
        return member

    def steps(self, count: int, seconds: float, tokens: int = 1) -> list[str]:
        """Return the ids of the generations that are ended during `count` steps of `seconds`."""
        ended = []
        for _ in range(count):
            self.now += seconds
            if (member := self.guard.step(tokens=tokens)) is not None:
                assert member.ended
                ended.append(member.request_id)
        return ended

    def chats(self, count: int, seconds: Callable[[], float], every: int, tokens: int = 500) -> list[str]:
        """Return the ids of the generations that are ended during `count` steps, with a new chat every `every` steps.

        A chat comes within a step. The next step reads its prompt of `tokens` tokens, and its first token comes after
        that step. The ten newest chats stay.
        """
        ended = []
        chats: list[tuple[Member, ExitStack]] = []
        for number in range(count):
            took = seconds()
            reads = [chat for chat, _ in chats if not chat.decoding]
            self.now += took / 2
            if number % every == 0:
                stack = self._open.enter_context(ExitStack())
                # Every second chat is structured.
                chat = self.guard.member(f"chat {number}", structured=number % (2 * every) == 0)
                chats.append((stack.enter_context(chat), stack))
            self.now -= took / 2
            ended += self.steps(1, took, len(chats) + tokens * len(reads))
            for member in reads:
                member.decoding = True
            if len(chats) > 10:
                chats.pop(0)[1].close()
        for _, stack in chats:
            stack.close()
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
    """A machine that full batches and other processes make ten times slower than at first is no reason either."""
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
    assert batch.steps(100, 5, tokens=1000) == []
    assert batch.steps(10, 5) == ["a"]


@pytest.mark.parametrize(("every", "tokens"), [(1, 20), (1, 500), (2, 20), (2, 500), (2, 2000), (5, 2000)])
def test_new_chats_do_not_put_it_off(every: int, tokens: int) -> None:
    """No chat is ended, not even a structured one, because the batch was slow before it came."""
    batch = Batch()
    slow = batch.member("slow")
    batch.steps(1, 0.05)
    assert batch.chats(400, lambda: 0.05 if slow.ended else 4, every, tokens) == ["slow"]


def test_whoever_slows_the_batch_is_found_among_those_who_came_when_it_was_slow() -> None:
    batch = Batch()
    batch.member("slow")
    batch.steps(3, 4)
    batch.member("slow, too")
    assert batch.steps(20, 4) == ["slow", "slow, too"]


def test_who_came_before_the_batch_was_slow_is_not_ended_for_a_single_slow_step() -> None:
    batch = Batch()
    batch.member("a")
    batch.steps(1, 3)
    batch.steps(1, 0.01)
    batch.member("slow")
    assert batch.steps(6, 4) == ["slow"]


@pytest.mark.parametrize("tokens", [10, 500, 2000])
def test_a_slow_machine_that_reads_prompts_all_the_time_is_no_reason(tokens: int) -> None:
    """It generates one token/s, reads 14 prompt tokens/s, and is five times slower when it is busy."""
    batch = Batch(best=1, token_seconds=0.07)
    batch.member("a")
    assert batch.chats(1000, lambda: (1 + tokens * 0.07) * 5, every=1, tokens=tokens) == []


def test_steps_without_anything_in_them_do_not_hide_the_slow_ones() -> None:
    batch = Batch()
    batch.member("a")
    ended = []
    for _ in range(20):
        ended += batch.steps(1, 3)
        ended += batch.steps(2, 0.001, tokens=0)
    assert ended == ["a"]


def test_a_step_that_reads_as_much_as_it_can_does_not_stall() -> None:
    """Such a step also reads a generation again that vLLM has preempted, where no job waits for a first token."""
    batch = Batch(best=1, token_seconds=0.07)
    batch.member("a")
    for _ in range(10):
        for _ in range(700):
            batch.now += 1
            assert batch.guard.check() is None
        assert batch.steps(1, 1, tokens=2048) == []


@pytest.mark.parametrize("first", [0, 1])
def test_schedulers_wait_for_each_others_prompts(first: int) -> None:
    batch = Batch()
    batch.member("a")
    for _ in range(100):
        batch.now += 5
        for scheduler in (first, 1 - first):
            assert batch.guard.step(scheduler, tokens=1 if scheduler else 2000) is None


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
