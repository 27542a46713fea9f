"""The budget of a batch as leases: each chunk that runs has one, and returns what it has not used of it.

A grant is cumulative: it is what a chunk may use in all its activities and attempts. What the chunk has used is durable
with its items. So a crash neither loses a lease nor doubles it.

A batch whose output tokens nobody has bounded may have to lease them itself, from the ledger of its tenant. What it has
leased is its budget then, which grows.
"""

from typing import Final, NamedTuple

from jobs.costs import cost_micros
from llm_pb import common_pb2, internal_pb2

Amounts = dict[str, int]
"""Amounts by the name of the field of a Budget that limits them. Times are in nanoseconds."""

ENGINE_TIME: Final = "engine_time"
_TOKENS: Final = "output_tokens"
_NUMBERS: Final = ("output_tokens", "prompt_tokens", "cost_micros")
_LEAST_ITEMS: Final = 16
"""Number of items for which a lease is to suffice, so that a chunk does not come back for each of them."""
_DEFAULT_TOKENS: Final = 256
"""Tokens of an item of whose size nothing is known."""
_LEAST_NANOSECONDS: Final = 60 * 10**9


class Lease(NamedTuple):
    """What a chunk may use."""

    grant: common_pb2.Budget
    last: bool
    """Whether the batch has nothing left beyond it."""


class Spent(NamedTuple):
    """Nothing is left."""

    field: str


def limits_of(budget: common_pb2.Budget) -> Amounts:
    """Return the limits that a budget sets."""
    limits = {name: value for name in _NUMBERS if (value := getattr(budget, name)) > 0}
    if (nanoseconds := budget.engine_time.ToNanoseconds()) > 0:
        limits[ENGINE_TIME] = nanoseconds
    return limits


def used_of(usage: common_pb2.Usage) -> Amounts:
    """Return what was used of each limit."""
    used = {name: int(getattr(usage, name)) for name in _NUMBERS}
    return used | {ENGINE_TIME: usage.engine_time.ToNanoseconds()}


def to_budget(amounts: Amounts) -> common_pb2.Budget:
    """Return the budget with these limits."""
    budget = common_pb2.Budget()
    for name in _NUMBERS:
        setattr(budget, name, amounts.get(name, 0))
    if ENGINE_TIME in amounts:
        budget.engine_time.FromNanoseconds(amounts[ENGINE_TIME])
    return budget


class Leases:
    """What the chunks of one batch hold of its budget."""

    def __init__(self, budget: common_pb2.Budget, shares: int, leased_tokens: int | None = None) -> None:
        """`shares` is the number of chunks that run at the same time.

        `leased_tokens` is the number of output tokens that the batch has leased so far; None where it need not.
        """
        self._limits = limits_of(budget)
        self._grows = leased_tokens is not None
        if leased_tokens is not None:
            self._limits[_TOKENS] = leased_tokens
        self.lacking = 0
        """Number of output tokens that a chunk needs beyond what the batch has leased, by the last call of lease()."""
        self.limited = bool(self._limits)
        self._shares = shares
        self._held: dict[int, Amounts] = {}
        self._running: set[int] = set()

    def lease(
        self, number: int, group: internal_pb2.PlanGroup, ended: common_pb2.Usage, result: internal_pb2.ChunkResult
    ) -> Lease | Spent | None:
        """Return the lease of a chunk that is to run; None while others hold what it needs, or the batch is `lacking`.

        `ended` is what the chunks that have ended have used, and `result` what this one has done.
        """
        if not self._limits:
            return Lease(common_pb2.Budget(), last=False)
        own, needed = used_of(result.usage), limits_of(result.needed)
        used, others = used_of(ended), [held for other, held in self._held.items() if other != number]
        least, short = _least(group), False
        if self._grows:
            # What an item needs the chunk tells: a tenant's day may be short.
            least[_TOKENS] = 1
        free, leased = Amounts(), Amounts()
        for name, limit in self._limits.items():
            free[name] = limit - used[name] - own[name] - sum(held[name] for held in others)
            wanted = max(needed.get(name, 0) - own[name], least[name])
            leased[name] = own[name] + max(wanted, free[name] // self._shares)
            if name == _TOKENS and self._grows:
                self.lacking = max(wanted - free[name], 0)
            else:
                short = short or free[name] < wanted
        if self.lacking:
            return None
        if short:
            if self._running - {number}:
                return None
            if (spent := next((name for name in self._limits if free[name] <= 0), None)) is not None:
                return Spent(spent)
            leased = {name: own[name] + free[name] for name in self._limits}
        self._held[number] = leased
        self._running.add(number)
        return Lease(to_budget(leased), last=short)

    def grow(self, tokens: int) -> None:
        """Note that the batch has leased further output tokens."""
        self._limits[_TOKENS] += tokens
        self.lacking = 0

    def give_back(self, tokens: int) -> None:
        """Note that the batch has given back output tokens, because they are less than a chunk needs."""
        self._limits[_TOKENS] -= tokens
        self.lacking += tokens

    def settle(self, number: int, usage: common_pb2.Usage) -> None:
        """Note that a chunk does not run any more, and take back what it has not used."""
        if number in self._held:
            self._held[number] = used_of(usage)
        self._running.discard(number)

    def drop(self, number: int) -> None:
        """Forget a chunk whose use counts among that of the ended ones."""
        self._held.pop(number, None)
        self._running.discard(number)


def _least(group: internal_pb2.PlanGroup) -> Amounts:
    """Return the lease with which it is worth the while to begin."""
    output, prompt = _LEAST_ITEMS * (group.default_max_tokens or _DEFAULT_TOKENS), _LEAST_ITEMS * _DEFAULT_TOKENS
    cost = cost_micros(group.price, prompt, output) if group.HasField("price") else 0
    return {
        "output_tokens": output,
        "prompt_tokens": prompt,
        "cost_micros": cost,
        ENGINE_TIME: _LEAST_NANOSECONDS,
    }
