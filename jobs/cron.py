"""Cron expressions: what a schedule accepts, as the values of each field.

They are read here and not by Temporal, so that an expression that is wrong, or that never matches, is refused with its
reason before anything is stored.
"""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

MAX_CRON: Final = 128
"""Maximum length of an expression in characters."""
_ALIASES: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_PART: Final = re.compile(r"(?:(\*)|([0-9]{1,2}|[A-Za-z]{3})(?:-([0-9]{1,2}|[A-Za-z]{3}))?)(?:/([0-9]{1,4}))?")
_MONTHS: Final = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS: Final = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_LONGEST: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
"""Maximum number of days of each month."""
_DAY_MINUTES: Final = 24 * 60


class Cron(NamedTuple):
    """An expression: the values that match, of each field in ascending order. A time matches if every field does."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days_of_month: tuple[int, ...]
    months: tuple[int, ...]
    days_of_week: tuple[int, ...]
    """0 is Sunday."""

    @property
    def shortest_minutes(self) -> int:
        """The shortest time between two matches that the fields minute and hour allow, in minutes."""
        times = [60 * hour + minute for hour in self.hours for minute in self.minutes]
        following = [*times[1:], times[0] + _DAY_MINUTES]
        return min(after - before for before, after in zip(times, following, strict=True))


class _Field(NamedTuple):
    name: str
    least: int
    most: int
    names: Mapping[str, int]


_FIELDS: Final = (
    _Field("minute", 0, 59, {}),
    _Field("hour", 0, 23, {}),
    _Field("day of month", 1, 31, {}),
    _Field("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    # Sunday is 0 or 7.
    _Field("day of week", 0, 7, {name: number for number, name in enumerate(_DAYS)}),
)


def parse(expression: str) -> Cron:
    """Return the expression's values. Raises ValueError, whose message is the rule that it breaks."""
    if len(expression) > MAX_CRON:
        raise ValueError(f"must have at most {MAX_CRON} characters")
    fields = _ALIASES.get(expression.strip().lower(), expression).split()
    if len(fields) != len(_FIELDS):
        raise ValueError(
            "must have five fields (minute, hour, day of month, month, day of week), or be @daily or alike"
        )
    minutes, hours, days, months, week = (_values(field, text) for field, text in zip(_FIELDS, fields, strict=True))
    if not any(day <= _LONGEST[month - 1] for month in months for day in days):
        raise ValueError("never matches: no such month has such a day")
    return Cron(minutes, hours, days, months, tuple(sorted({day % 7 for day in week})))


def _values(field: _Field, text: str) -> tuple[int, ...]:
    values: set[int] = set()
    for part in text.split(","):
        found = _PART.fullmatch(part)
        if found is None:
            raise ValueError(f"has a {field.name} that is no number, range, list or *, with a step or without")
        every, first, last, step = found.groups()
        start = field.least if every else _number(field, first)
        # As in Temporal and most crons, 5/10 is 5-59/10.
        end = _number(field, last) if last else field.most if every or step else start
        if field.name == "day of week" and (every or (last and end == 0)):
            # A range may end with Sunday: MON-SUN.
            end = 6 if every else 7
        if end < start:
            raise ValueError(f"has a {field.name} whose range ends before it begins")
        if step is not None and int(step) == 0:
            raise ValueError(f"has a {field.name} whose step is 0")
        values.update(range(start, end + 1, int(step or 1)))
    return tuple(sorted(values))


def _number(field: _Field, text: str) -> int:
    number = int(text) if text.isdigit() else field.names.get(text.upper(), -1)
    if not field.least <= number <= field.most:
        raise ValueError(f"has a {field.name} that is not within {field.least} to {field.most}")
    return number
