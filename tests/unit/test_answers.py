"""The cost of enforcing the budget of unread answers."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from runtime.answers import MAKING_COPIES, Answer, Answers

MESSAGES = 200


class Call:
    """The part of a call's context that Answers uses."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Ignore the callback: the calls of this test do not end."""


def seconds_of(answer: Answer, size: int) -> float:
    """Return the seconds that it takes to account for MESSAGES messages."""
    began = time.perf_counter()
    for _ in range(MESSAGES):
        answer.sending(size)
        answer.left()
    return time.perf_counter() - began


@pytest.mark.parametrize("stream", [True, False])
async def test_who_waits_costs_others_nothing(stream: bool) -> None:
    """A message costs about the same while 5,000 calls wait; a scan of them would make it hundreds of times slower."""
    answers = Answers(10_000, 1 << 20)
    other = answers.open(Call("other"), stream=stream)
    alone = min(seconds_of(other, 2000) for _ in range(5))
    holder = answers.open(Call("first"))
    await holder.reserve(100_000)
    waiting = [asyncio.create_task(answers.open(Call("first")).reserve(100_000)) for _ in range(5000)]
    await asyncio.sleep(0)
    assert min(seconds_of(other, 2000) for _ in range(5)) < 50 * alone
    holder.left()
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_call_that_needs_less_than_it_has_reserved_is_admitted_once() -> None:
    """It waits although it asks for less, because another call of its connection holds most of the budget."""
    answers = Answers(10, 1 << 20)
    first, second = answers.open(Call("one")), answers.open(Call("one"))
    await first.reserve(30_000)
    await second.reserve(150_000)
    waiting = asyncio.create_task(first.reserve(20_000))
    await asyncio.sleep(0)
    assert not waiting.done()
    second.left()
    await waiting
    assert answers.held_bytes == 20_000 * MAKING_COPIES
