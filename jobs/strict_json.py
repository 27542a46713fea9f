"""JSON of callers, read strictly: each text has one meaning, and a bounded number of values."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, NoReturn

from jobs.field_rules import Violation

MAX_VALUES: Final = 20_000
"""Maximum number of values in an object: twice as many as the gateway takes in a request, and a moment to read."""
_MAX_DEPTH: Final = 256
"""Maximum depth of objects and lists: twice that of a JSON Schema, and far from what Python's own recursion takes."""
_MAX_VIOLATIONS: Final = 100


class NoObject(ValueError):
    """A text is no JSON object, or one that is not taken. Its words follow the name of the text: `must be …`."""


class RepeatedKeys(NoObject):
    """A JSON object has a key more than once."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{field} {description}" for field, description in violations))
        self.violations = violations
        """The keys: at most 100."""


def read_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that is the text.

    Raises RepeatedKeys for a key that an object has twice; NoObject for anything else than an object in UTF-8, for NaN
    and Infinity, for a key with half a surrogate pair, for more than MAX_VALUES values, and for one that is nested too
    deeply.
    """
    repeated: list[Violation] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        for key in found:
            # Raises a ValueError for half a surrogate pair, which no answer could hold.
            key.encode()
        if len(found) < len(pairs):
            numbers = Counter(key for key, _ in pairs)
            repeated.extend(Violation(key, "is there more than once") for key in found if numbers[key] > 1)
        return found

    try:
        # Of bytes, the json module would take UTF-16 and UTF-32 as well.
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise NoObject(f"is no UTF-8 from byte {error.start} on") from None
    except UnicodeEncodeError:
        raise NoObject("has a key with half a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise NoObject(f"is no JSON: {error}") from None
    except _Constant as error:
        raise NoObject(f"is no JSON: {error} is no number") from None
    except RecursionError:
        raise NoObject("is nested too deeply") from None
    except ValueError:
        # Python's own limit.
        raise NoObject("holds a number of too many digits") from None
    if repeated:
        raise RepeatedKeys(repeated[:_MAX_VIOLATIONS])
    if not isinstance(value, dict):
        raise NoObject("must be a JSON object")
    _require_bounded(value)
    return value


class _Constant(ValueError):
    """NaN or an Infinity."""


def _no_constant(name: str) -> NoReturn:
    raise _Constant(name)


def _require_bounded(value: Any) -> None:
    """Raise NoObject for too many values, those of keys not counted, and for too many levels."""
    number, depth, level = 0, 0, [value]
    while level:
        number, depth = number + len(level), depth + 1
        if number > MAX_VALUES:
            raise NoObject(f"holds more than {MAX_VALUES} values")
        if depth > _MAX_DEPTH:
            # json.loads accepts a value that is too deep for whoever walks it.
            raise NoObject("is nested too deeply")
        level = [item for found in level if isinstance(found, dict | list) for item in _items(found)]


def _items(found: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return found.values() if isinstance(found, dict) else found
