"""Ends structured generations that slow the whole batch, newest first, so that the engine and the others continue.

The tokens that may follow in a generation's output are computed in the step that the whole batch shares. The rules
refuse constraints that would make it slow, by their form alone (jobs.regex_cost). The guard is for those that the rules
miss. How slow a step may be depends on the engine's best as well as on the floor: an engine on a slow machine has never
been fast, so no generation is to blame.

A prompt that is read slows the batch, too. So a step may take longer for the tokens that it reads: for each of them
SLOWDOWN times what a token took when the engine had nothing else to do. A stream of new prompts allows a generation no
more than that.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Final

FLOOR: Final = 1.0
"""Tokens per second of each generation in the batch. At this rate or a higher one, none is ended."""
SLOWDOWN: Final = 50.0
"""Factor by which a step may be slower than the engine's best before a generation is ended. Full batches and busy
machines stay within it."""
WINDOW_SECONDS: Final = 10.0
"""Minimum time for which the batch has to be too slow."""
WINDOW_STEPS: Final = 3
"""Minimum number of steps for which the batch has to be too slow."""
STALL_SECONDS: Final = 20.0
"""Minimum time of a single step that is enough to end a generation. It must also be too long for a step that reads as
much as a step can."""
PACE_STEPS: Final = 8
"""Number of consecutive steps that show how fast an engine is. A single one may have been fast by chance."""


@dataclass(eq=False)
class Member:
    """One generation."""

    request_id: str
    structured: bool
    arrived_at: float
    """In seconds of the guard's clock."""
    decoding: bool = False
    """Whether it has generated a token."""
    ended: bool = False
    """Whether the guard has ended it."""


@dataclass(eq=False)
class _Scheduler:
    """The steps of one of the engine's schedulers since they were last judged."""

    stepped_at: float = 0.0
    counts: bool = False
    """Whether the time since stepped_at is that of a step, in which something is decoded."""
    seconds: list[float] = field(default_factory=list)
    """Duration of each step that counts."""
    shares: list[float] = field(default_factory=list)
    """Each duration as a share of what the step may take. More than 1 is too slow."""
    tokens: int = 0
    """Tokens of the last step."""
    slow_since: float = float("inf")
    """When the first of the steps that are too slow had taken the maximum time of a step."""

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
    """Seconds that reading a token of a prompt takes at the engine's best. The engine sets it."""
    max_step_tokens: int = 0
    """Maximum number of tokens of one step. The engine sets it."""
    _members: list[Member] = field(default_factory=list)
    _schedulers: dict[int, _Scheduler] = field(default_factory=dict)

    @contextmanager
    def member(self, request_id: str, *, structured: bool) -> Iterator[Member]:
        """Count a generation as one of the batch while the context is open. The caller sets its `decoding`."""
        member = Member(request_id, structured, self.clock())
        self._members.append(member)
        try:
            yield member
        finally:
            self._members.remove(member)
            if not self._decoding():
                # The next step may come after a pause.
                for steps in self._schedulers.values():
                    steps.counts = False

    def step(self, scheduler: int = 0, tokens: int = 1) -> Member | None:
        """Note that a scheduler has finished a step. Return the generation that has to end, if any, with `ended` set.

        `tokens` is how many went into the step: those of prompts, and the last one of each generation. A step without
        any, which vLLM also reports, does not count.
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
        # A single slow step may have had another cause.
        too_slow = median(steps.shares) > 1
        judged = total >= WINDOW_SECONDS and count >= WINDOW_STEPS
        if judged or (count >= PACE_STEPS and not too_slow):
            if max(steps.shares) <= 1:
                steps.slow_since = float("inf")
            steps.clear()
        return self._end_newest(steps) if judged and too_slow else None

    def check(self) -> Member | None:
        """Return the generation that has to end because a step does not end. Call it periodically."""
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
        """End the newest generation that may be the cause. One that came when steps were already slow is not."""
        for member in reversed(self._members):
            if member.structured and not member.ended and member.arrived_at <= steps.slow_since:
                member.ended = True
                return member
        # None of them is the cause, so one that came later may be.
        steps.slow_since = float("inf")
        return None
