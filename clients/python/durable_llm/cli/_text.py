"""Text for people: what a terminal may show, durations, times."""

import re
import sys
from datetime import UTC, datetime, timedelta

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST = timedelta(days=3_652_500)
"""The longest duration that a message holds: 10,000 years."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def visible(text: str) -> str:
    """Return the text without characters that control a terminal: a model could write them. Lines may end in CR LF."""
    return _CONTROLS.sub("�", text)


def say(text: str) -> None:
    """Write a line to standard error. A character that its encoding lacks is escaped."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def parse_duration(text: str) -> timedelta:
    """Return the duration that a text such as 90, 90s, 5m or 1h30m names. Raises ValueError."""
    text = text.strip()
    plain = re.fullmatch(r"\d+(?:\.\d+)?", text) is not None
    parts = [(text, "s")] if plain else _DURATION.findall(text)
    if not plain and (not parts or "".join(number + unit for number, unit in parts) != text):
        raise ValueError(f"{text!r} is no duration: write 90s, 5m or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds > _LONGEST.total_seconds():
        raise ValueError(f"{text!r} is longer than 10,000 years")
    return timedelta(seconds=seconds)


def age(since: datetime) -> str:
    """Return how long ago a time in UTC was, in one unit."""
    seconds = max(0.0, (datetime.now(UTC) - since.replace(tzinfo=UTC)).total_seconds())
    for unit in ("d", "h", "m"):
        if seconds >= _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.0f}{unit}"
    return f"{seconds:.0f}s"
