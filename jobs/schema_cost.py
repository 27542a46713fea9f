"""The cost of a JSON Schema for the engine, estimated from its regular expressions and lengths.

No other part of a schema was found to cost more than a millisecond a token (xgrammar 0.2.8, a vocabulary of 131,000
tokens): not arrays of arrays with maxItems of 500 each, objects of 100 properties, or 200 alternatives. The length of a
string is a repeat. Each different length takes 2 s to compile (5 s on a busy machine), concurrently with the engine's
steps.
"""

from collections.abc import Iterator
from typing import Any, Final

from jobs.regex_cost import MAX_BOUND, check_bounds, sum_of_bounds
from jobs.regex_parts import TooCostly

MAX_DEPTH: Final = 128
"""Maximum depth of objects and arrays in a schema. Compiling takes the cube of it: 9 s for 300 on a busy machine."""
MAX_OPTIONAL: Final = 512
"""Maximum number of properties of an object that it need not have. Compiling takes the square of it."""
MAX_PATTERN_BYTES: Final = 4 * 1024
"""Maximum size of all different patterns of a schema together."""
_COSTLY: Final = frozenset(("maxLength", "minLength", "pattern", "patternProperties", "properties"))
"""The keywords that are read here."""
_CONTAINERS: Final = (dict, list)
_SHOWN: Final = 60
"""Maximum number of characters of a pattern that an error message shows."""


def check_schema(schema: dict[str, Any]) -> None:
    """Raise TooCostly for a schema that would slow the engine's whole batch or take too long to compile."""
    patterns: dict[str, None] = {}
    lengths: set[tuple[float, float]] = set()
    for item in _objects(schema):
        # Most objects say none of it, and a hostile schema has 20,000 of them.
        if _COSTLY.isdisjoint(item):
            continue
        _check_optional(item)
        patterns.update(dict.fromkeys(_patterns(item)))
        lengths.add((_length(item.get("minLength")), _length(item.get("maxLength"))))
    if sum(len(pattern.encode("utf-8", "surrogatepass")) for pattern in patterns) > MAX_PATTERN_BYTES:
        raise TooCostly(f"must have patterns of at most {MAX_PATTERN_BYTES} bytes together")
    bounds = sum(int(min(max(length), MAX_BOUND)) for length in lengths)
    for pattern in patterns:
        try:
            bounds += sum_of_bounds(pattern)
        except TooCostly as error:
            shown = pattern if len(pattern) <= _SHOWN else pattern[:_SHOWN] + "…"
            raise TooCostly(f"has the pattern {shown!r}, which {error}") from error
    check_bounds(bounds)


def _patterns(item: dict[str, Any]) -> Iterator[str]:
    if isinstance(pattern := item.get("pattern"), str):
        yield pattern
    if isinstance(by_pattern := item.get("patternProperties"), dict):
        yield from by_pattern


def _objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every object in the schema that is not empty. Raises TooCostly for one that is nested too deeply.

    They include data, such as the values of an enum: to distinguish those from a property named "enum" is not worth the
    effort.
    """
    level: list[dict[str, Any] | list[Any]] = [schema]
    for _ in range(MAX_DEPTH):
        inner: list[dict[str, Any] | list[Any]] = []
        for item in level:
            if isinstance(item, dict) and item:
                yield item
            values = item.values() if isinstance(item, dict) else item
            inner.extend([value for value in values if isinstance(value, _CONTAINERS)])
        if not inner:
            return
        level = inner
    raise TooCostly(f"must nest objects and arrays at most {MAX_DEPTH} deep")


def _check_optional(item: dict[str, Any]) -> None:
    properties, required = item.get("properties"), item.get("required")
    if not isinstance(properties, dict):
        return
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    if len(properties.keys() - needed) > MAX_OPTIONAL:
        raise TooCostly(f"must have objects of at most {MAX_OPTIONAL} properties that are not required")


def _length(value: Any) -> float:
    # json.loads accepts NaN, which is not above 0 either.
    return value if isinstance(value, int | float) and value > 0 else 0
