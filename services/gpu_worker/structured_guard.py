"""Ends structured generations that slow the whole batch, newest first, so that the engine and the others go on.

What may follow in a generation's output is worked out in the step that the whole batch shares. The rules refuse what
would make that slow, by its form alone (jobs.regex_cost); this is for what they miss. The floor is a rate of tokens,
and each engine has its own: an honest engine is slow because its machine is, and then it was never fast.

Not counted is time in which some generation waits for its first token: it may be long because a prompt is read. So one
that keeps new prompts coming can put the guard off, for as long as they do.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Final

FLOOR: Final = 1.0
"""Tokens a second of each generation in the batch: as long as it makes so many, nothing is ended."""
SLOWDOWN: Final = 50.0
"""Nor as long as it makes this part of what the engine made at its best. Full batches and busy machines stay within."""
WINDOW_SECONDS: Final = 10.0
"""How long the batch has to be too slow."""
WINDOW_STEPS: Final = 3
"""And for how many steps."""
STALL_SECONDS: Final = 20.0
"""A step that takes so long, and too long by SLOWDOWN, needs no others. Less than a job may be without a token."""
PACE_STEPS: Final = 8
"""Steps in a row that show how fast an engine is: a single one may have been quick by chance."""


@dataclass(eq=False)
class Member:
    """One generation."""

    request_id: str
    structured: bool
    decoding: bool = False
    """Whether it has made a token."""
    ended: bool = False
    """Whether the guard has ended it."""


@dataclass(eq=False)
class _Scheduler:
    """The steps of one of the engine's schedulers since they were last judged."""

    stepped_at: float = 0.0
    counts: bool = False
    """Whether the time since then is that of a step: something is decoded and no prompt read."""
    seconds: list[float] = field(default_factory=list)
    """Of each step that counts."""


@dataclass
class StructuredGuard:
    """Watches the pace of a batch. All methods are called on one event loop."""

    floor: float = FLOOR
    slowdown: float = SLOWDOWN
    clock: Callable[[], float] = time.monotonic
    best: float = float("inf")
    """Seconds of a step at the engine's best."""
    _members: list[Member] = field(default_factory=list)
    _schedulers: dict[int, _Scheduler] = field(default_factory=dict)

    @contextmanager
    def member(self, request_id: str, *, structured: bool) -> Iterator[Member]:
        """Count a generation as one of the batch while the context is open. Its `decoding` is for the caller to set."""
        member = Member(request_id, structured)
        self._members.append(member)
        self._interrupt()
        try:
            yield member
        finally:
            self._members.remove(member)
            if not self._decoding():
                self._interrupt()

    def step(self, scheduler: int = 0) -> Member | None:
        """Note that a scheduler has finished a step. Return the generation that has to end, as its `ended` says."""
        now, steps = self.clock(), self._schedulers.setdefault(scheduler, _Scheduler())
        if steps.counts:
            steps.seconds.append(now - steps.stepped_at)
        steps.stepped_at, steps.counts = now, self._decoding()
        if not steps.seconds:
            return None
        count, total = len(steps.seconds), sum(steps.seconds)
        if count >= PACE_STEPS:
            self.best = min(self.best, total / count)
        # A single step may have had another reason.
        too_slow = median(steps.seconds) > self._slowest()
        judged = total >= WINDOW_SECONDS and count >= WINDOW_STEPS
        if judged or (count >= PACE_STEPS and not too_slow):
            steps.seconds.clear()
        return self._end_newest() if judged and too_slow else None

    def check(self) -> Member | None:
        """Return the generation that has to end because a step does not: for calling every now and then."""
        now = self.clock()
        for steps in self._schedulers.values():
            if steps.counts and now - steps.stepped_at > max(STALL_SECONDS, self._slowest()):
                steps.stepped_at = now
                return self._end_newest()
        return None

    def reason(self) -> str:
        """Return why a generation was ended, for its client."""
        rate = f"less than {1 / self._slowest():.2g} tokens a second"
        return f"slowed every job of its batch to {rate}: simplify it, with fewer repeats that match the same text"

    def _slowest(self) -> float:
        """Return the seconds that a step may take. Infinite before the engine's best is known."""
        return max(1 / self.floor, self.best * self.slowdown) if self.floor else float("inf")

    def _decoding(self) -> bool:
        running = [member.decoding for member in self._members if not member.ended]
        return bool(running) and all(running)

    def _interrupt(self) -> None:
        for steps in self._schedulers.values():
            steps.counts = False

    def _end_newest(self) -> Member | None:
        running = [member for member in self._members if member.structured and not member.ended]
        for member in running[-1:]:
            member.ended = True
            return member
        return None
