"""Ends structured generations that slow the whole batch, newest first, so that the engine and the others go on.

What may follow in a generation's output is worked out in the step that the whole batch shares. The rules refuse what
would make that slow, by its form alone (jobs.regex_cost); this is for what they miss. The floor is a rate of tokens,
and each engine has its own: an honest engine is slow because its machine is, and then it was never fast.

A prompt that is read slows the batch, too. So a step may take longer by what it reads: for each token SLOWDOWN times
what one took when the engine had nothing else to do. New prompts that keep coming give a generation no more than that.
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
"""A step that takes so long, and too long even if it reads as much as a step can, needs no others."""
PACE_STEPS: Final = 8
"""Steps in a row that show how fast an engine is: a single one may have been quick by chance."""


@dataclass(eq=False)
class Member:
    """One generation."""

    request_id: str
    structured: bool
    arrived_at: float
    """In seconds of the guard's clock."""
    decoding: bool = False
    """Whether it has made a token."""
    ended: bool = False
    """Whether the guard has ended it."""


@dataclass(eq=False)
class _Scheduler:
    """The steps of one of the engine's schedulers since they were last judged."""

    stepped_at: float = 0.0
    counts: bool = False
    """Whether the time since then is that of a step: something is decoded."""
    seconds: list[float] = field(default_factory=list)
    """Of each step that counts."""
    shares: list[float] = field(default_factory=list)
    """Of the seconds that each might take: more than 1 is too slow."""
    tokens: int = 0
    """Of the last step."""
    slow_since: float = float("inf")
    """When the first of the steps that are too slow had taken as long as one may."""

    def clear(self) -> None:
        self.seconds.clear()
        self.shares.clear()


@dataclass
class StructuredGuard:
    """Watches the pace of a batch. All methods are called on one event loop."""

    floor: float = FLOOR
    slowdown: float = SLOWDOWN
    clock: Callable[[], float] = time.monotonic
    best: float = float("inf")
    """Seconds of a step at the engine's best."""
    token_seconds: float = 0.0
    """Seconds that reading a token of a prompt takes at the engine's best. For the engine to set."""
    max_step_tokens: int = 0
    """Tokens of one step at most. For the engine to set."""
    _members: list[Member] = field(default_factory=list)
    _schedulers: dict[int, _Scheduler] = field(default_factory=dict)

    @contextmanager
    def member(self, request_id: str, *, structured: bool) -> Iterator[Member]:
        """Count a generation as one of the batch while the context is open. Its `decoding` is for the caller to set."""
        member = Member(request_id, structured, self.clock())
        self._members.append(member)
        try:
            yield member
        finally:
            self._members.remove(member)
            if not self._decoding():
                # What comes next may come after a pause.
                for steps in self._schedulers.values():
                    steps.counts = False

    def step(self, scheduler: int = 0, tokens: int = 1) -> Member | None:
        """Note that a scheduler has finished a step. Return the generation that has to end, as its `ended` says.

        `tokens` are those that went into the step: of prompts, and the last one of each generation. One without any,
        of which vLLM tells, too, does not count.
        """
        now, steps = self.clock(), self._schedulers.setdefault(scheduler, _Scheduler())
        steps.tokens = tokens
        if steps.counts and tokens:
            self._note(steps, now - steps.stepped_at)
        steps.stepped_at, steps.counts = now, self._decoding()
        if not steps.seconds:
            return None
        count, total = len(steps.seconds), sum(steps.seconds)
        if count >= PACE_STEPS:
            self.best = min(self.best, total / count)
        # A single step may have had another reason.
        too_slow = median(steps.shares) > 1
        judged = total >= WINDOW_SECONDS and count >= WINDOW_STEPS
        if judged or (count >= PACE_STEPS and not too_slow):
            if max(steps.shares) <= 1:
                steps.slow_since = float("inf")
            steps.clear()
        return self._end_newest(steps) if judged and too_slow else None

    def check(self) -> Member | None:
        """Return the generation that has to end because a step does not: for calling every now and then."""
        now = self.clock()
        for steps in self._schedulers.values():
            allowed = max(STALL_SECONDS, self._allowed(self.max_step_tokens))
            if steps.counts and now - steps.stepped_at > allowed:
                steps.slow_since = min(steps.slow_since, steps.stepped_at + self._slowest())
                steps.stepped_at = now
                return self._end_newest(steps)
        return None

    def reason(self) -> str:
        """Return why a generation was ended, for its client."""
        rate = f"less than {1 / self._slowest():.2g} tokens a second"
        return f"slowed every job of its batch to {rate}: simplify it, with fewer repeats that match the same text"

    def _slowest(self) -> float:
        """Return the seconds that a step may take. Infinite before the engine's best is known."""
        return max(1 / self.floor, self.best * self.slowdown) if self.floor else float("inf")

    def _note(self, steps: _Scheduler, seconds: float) -> None:
        """Note a step that counts."""
        # Schedulers in parallel wait for each other's prompts.
        tokens = sum(other.tokens for other in self._schedulers.values() if other.stepped_at >= steps.stepped_at)
        allowed = self._allowed(tokens)
        steps.seconds.append(seconds)
        steps.shares.append(seconds / allowed)
        if seconds > allowed:
            steps.slow_since = min(steps.slow_since, steps.stepped_at + self._slowest())
        elif seconds <= self._slowest():
            steps.slow_since = float("inf")

    def _allowed(self, tokens: int) -> float:
        """Return the seconds that a step of so many tokens may take."""
        return self._slowest() + tokens * self.token_seconds * self.slowdown

    def _decoding(self) -> bool:
        return any(member.decoding and not member.ended for member in self._members)

    def _end_newest(self, steps: _Scheduler) -> Member | None:
        """End the newest of those that may be the reason: what came when steps were slow already is not."""
        for member in reversed(self._members):
            if member.structured and not member.ended and member.arrived_at <= steps.slow_since:
                member.ended = True
                return member
        # It was none of them, so it may be one that came since.
        steps.slow_since = float("inf")
        return None
