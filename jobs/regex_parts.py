"""The parts of a regular expression, and the cost of their combinations: see jobs.regex_cost.

A set of characters is an int with one bit for each character of ASCII, and one for each block beyond it.
"""

from collections.abc import Collection, Iterable
from functools import lru_cache, reduce
from operator import or_
from typing import Final, NamedTuple

MAX_PRODUCT: Final = 6
"""Maximum number of parts of varying length that follow each other in a repeat without a separator."""
MAX_DIGITS_PRODUCT: Final = 16
"""MAX_PRODUCT for parts that match only digits. It is higher, because few tokens of a vocabulary hold only digits."""
MAX_RUN: Final = 6
"""Maximum number of adjacent parts of varying length that could match the same text: `.*a.*b.*` has three. A group
counts as 3, a repeat of a part of varying length as 4."""
MAX_DIFFERENT: Final = 64
"""Maximum number of different parts of varying length in one sequence, or at the ends of one group's alternatives. Each
is compared with all required parts there, on the event loop that serves all requests."""

_UNBOUNDED: Final = 3
"""Weight of an unbounded repeat within MAX_PRODUCT: two in a row still pass."""
_GROUP: Final = 3
"""Weight of a group of varying length within MAX_RUN."""
_PRODUCT: Final = 4
"""Weight of a repeat of a part of varying length within MAX_RUN: two adjacent ones cost as much as one of twice the
product."""
_ASCII: Final = 128
_BLOCK: Final = 10
"""Characters beyond ASCII are distinguished by blocks of 2**10 code points, which are mostly scripts."""
ALL: Final = (1 << (_ASCII + (0x110000 >> _BLOCK))) - 1
"""Every character."""


def range_of(low: int, high: int) -> int:
    """Return the set of the characters between two code points, both included."""
    first, last = (code if code < _ASCII else _ASCII + (code >> _BLOCK) for code in (low, high))
    return ((1 << (last - first + 1)) - 1) << first if last >= first else 0


DIGITS: Final = range_of(ord("0"), ord("9"))
"""The decimal digits of ASCII."""


class TooCostly(ValueError):
    """The expression would slow the whole batch. The message says what to change."""


class Part(NamedTuple):
    """A part of an expression. Sets of characters are the bits of an int."""

    chars: int = 0
    """All characters that it may match."""
    first: int = 0
    """All characters that it may begin with."""
    required: frozenset[int] = frozenset()
    """Sets of characters. Every match holds a character of each set."""
    loose: int = 0
    """The characters of its parts of varying length that have a separator on neither side."""
    weight: int = 0
    """The number of lengths that those parts may have."""
    exposed: int = 0
    """The characters of its parts of varying length that have a separator on one side only."""
    single: bool = False
    """Whether it is one character."""
    run: int = 1
    """Its weight within MAX_RUN."""
    size: int = 0
    """Its length in characters, if it has only one length."""

    @property
    def varies(self) -> bool:
        """Whether it may have several lengths."""
        return bool(self.loose or self.exposed)


def repeated(body: Part, low: int, high: int | None) -> Part:
    """Return the part, repeated; `high` is None for a repeat without an upper bound. Raises TooCostly."""
    if high == 0:
        return Part()
    required = body.required if low else frozenset()
    weight = _UNBOUNDED if high is None else high - low + 1
    run = 1 if body.single else max(_GROUP, body.run)
    if (high is None or high > 1) and body.loose:
        weight = body.weight * (high or MAX_DIGITS_PRODUCT + 1)
        if weight > (MAX_PRODUCT if body.loose & ~DIGITS else MAX_DIGITS_PRODUCT):
            raise TooCostly(
                "must not repeat a part that varies in length without a required separator: in (a+)*, "
                r"(\w+ ?)* or (\w{1,8}){1,8} one text can be read in many ways, and each costs the engine time at "
                r"every token; write (\w+ )* or \w+( \w+)*"
            )
        run = _PRODUCT
    elif low == high:
        return body._replace(required=required, single=False, size=body.size * low)
    elif body.loose:
        weight = body.weight + 1
    return Part(body.chars, body.first, required, body.chars, weight, run=run)


def char_of(chars: int) -> Part:
    """Return one character of the set."""
    # An empty class, which the engine refuses, separates nothing.
    chars = chars or ALL
    return Part(chars, chars, frozenset((chars,)), single=True, size=1)


@lru_cache
def literal(char: str) -> Part:
    """Return a part that matches the character."""
    return char_of(bits_of(char))


def joined(parts: list[Part]) -> Part:
    """Return the sequence of parts as one part. Raises TooCostly."""
    if len(parts) == 1:
        return parts[0]
    _check_run(parts)
    first_at, last_at = _required_at(parts, range(len(parts))), _required_at(parts, reversed(range(len(parts))))
    separated: dict[int, tuple[int, int]] = {}
    chars, first, loose, exposed, weight = 0, 0, 0, 0, 0
    nullable = True
    for index, part in enumerate(parts):
        chars |= part.chars
        if nullable:
            first |= part.first
            nullable = not part.required
        exposed |= part.exposed
        if not part.loose:
            continue
        if part.loose not in separated:
            separated[part.loose] = (_nearest(first_at, part.loose, len(parts)), _nearest(last_at, part.loose, -1))
            _check_different(separated)
        earliest, latest = separated[part.loose]
        before, after = earliest < index, latest > index
        if not before and not after:
            loose |= part.loose
            weight += part.weight
        elif not before or not after:
            exposed |= part.loose
    # The smallest sets separate best. All sets would be compared again in every group around this one.
    required = frozenset(sorted(first_at, key=int.bit_count)[:MAX_DIFFERENT])
    size = sum(part.size for part in parts)
    return Part(chars, first, required, loose, weight, exposed, run=_run_of(parts), size=size)


def _required_at(parts: list[Part], indexes: Iterable[int]) -> dict[int, int]:
    """Return the sets of characters that the parts require, each with the first of `indexes` where it is required."""
    at: dict[int, int] = {}
    for index in indexes:
        for chars in parts[index].required:
            at.setdefault(chars, index)
    return at


def _nearest(required_at: dict[int, int], loose: int, default: int) -> int:
    """Return the first index at which a set without any of the characters is required, or `default`."""
    return next((index for chars, index in required_at.items() if not chars & loose), default)


def _check_different(different: Collection[object]) -> None:
    if len(different) > MAX_DIFFERENT:
        raise TooCostly(
            f"must have at most {MAX_DIFFERENT} different parts of varying length in a row, or at the ends of a "
            "group's alternatives: use fewer, or repeat the same part"
        )


def _check_run(parts: Iterable[Part]) -> None:
    """Raise TooCostly for too many adjacent parts of varying length that could match the same text."""
    run, count = 0, 0
    for part in parts:
        if run and _separates(part, run):
            run, count = 0, 0
        if part.loose:
            if part.first & run or not run:
                count += part.run
            run |= part.loose
        if count > MAX_RUN:
            raise TooCostly(
                r"must have fewer adjacent parts that vary in length and match the same text, like \w*\w*\w* or "
                r"(\w+)?(\w+)?(\w+)? or (\w+ ?){2}(\w+ ?){2}: put a required separator between them, "
                "or make one part of them"
            )


def _run_of(parts: Iterable[Part]) -> int:
    """Return the weight of a group of the parts within MAX_RUN."""
    return max([_GROUP, *(part.run for part in parts)])


def _separates(part: Part, loose: int) -> bool:
    """Return whether the part requires a set without any of the characters."""
    return any(not chars & loose for chars in part.required)


def one_of(branches: list[Part]) -> Part:
    """Return the alternatives as one part. Raises TooCostly."""
    if len(branches) == 1:
        return branches[0]
    chars, first, loose, exposed, weight, size = 0, 0, 0, 0, 0, 0
    for branch in branches:
        chars |= branch.chars
        first |= branch.first
        loose |= branch.loose
        exposed |= branch.exposed
        weight = max(weight, branch.weight)
        size = max(size, branch.size)
    cuts = {branch.exposed for branch in branches} - {0}
    _check_different(cuts)
    makers = {(branch.required, branch.exposed) for branch in branches} if cuts else ()
    for cut in cuts:
        # Another branch can match the rest of a branch that is separated on one side only: (\w+ |\w)*.
        if any(other != cut and all(map(cut.__and__, required)) for required, other in makers):
            loose |= cut
            weight = max(weight, _UNBOUNDED)
    vague = [branch for branch in branches if not branch.varies and _is_vague(branch)]
    if len(sizes := {branch.size for branch in vague}) > 1:
        # No character shows which of the branches of different lengths it is: (.{3}|.{20})*.
        loose |= _union(branch.chars for branch in vague)
        weight = max(weight, len(sizes))
    required = frozenset[int]()
    if all(branch.required for branch in branches):
        required = frozenset((_union(min(branch.required, key=int.bit_count) for branch in branches),))
    return Part(chars, first, required, loose, weight, exposed, run=_run_of(branches), size=size)


def _is_vague(part: Part) -> bool:
    """Return whether the part requires classes only, and no single character."""
    return bool(part.required) and all(chars.bit_count() > 1 for chars in part.required)


def _union(sets: Iterable[int]) -> int:
    """Return the set of all characters of the sets."""
    return reduce(or_, sets, 0)


def bits_of(text: str) -> int:
    """Return the set of the text's characters."""
    bits = 0
    for char in text:
        bits |= range_of(ord(char), ord(char))
    return bits
