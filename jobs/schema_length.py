"""The length of the longest JSON that a JSON Schema allows."""

import json
from typing import Any, Final

_LENGTHS: Final = {"boolean": len("false"), "null": len("null"), "integer": 24, "number": 24}
"""Maximum length of values whose type bounds it, in characters. A number has at most 17 digits, a sign, an exponent."""
_SEPARATOR: Final = len(", ")


def longest_json(schema: Any) -> int | None:
    """Return the length in characters of the longest JSON in one line that a schema allows; None if it has no bound.

    A character in a text counts once, whether JSON escapes it or not. Of the keywords only these are understood: const,
    enum, type, properties, additionalProperties, items, maxItems and maxLength. Others can but shorten the JSON,
    except `prefixItems` and `patternProperties`, with which it has no bound here.
    """
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return len(json.dumps(schema["const"], ensure_ascii=False))
    if isinstance(schema.get("enum"), list):
        return max((len(json.dumps(value, ensure_ascii=False)) for value in schema["enum"]), default=0)
    match schema.get("type"):
        case "string":
            return None if (most := _count(schema, "maxLength")) is None else most + len('""')
        case "array":
            most, item = _count(schema, "maxItems"), longest_json(schema.get("items"))
            if most is None or item is None or "prefixItems" in schema:
                return None
            return most * (item + _SEPARATOR) + len("[]")
        case "object":
            return _longest_object(schema)
        case str(name):
            return _LENGTHS.get(name)
        case _:
            return None


def _longest_object(schema: dict[str, Any]) -> int | None:
    properties = schema.get("properties", {})
    if schema.get("additionalProperties") is not False or "patternProperties" in schema:
        return None
    if not isinstance(properties, dict):
        return None
    whole = len("{}")
    for name, value in properties.items():
        if (longest := longest_json(value)) is None:
            return None
        whole += len(json.dumps(name, ensure_ascii=False)) + len(": ") + longest + _SEPARATOR
    return whole


def _count(schema: dict[str, Any], keyword: str) -> int | None:
    return value if isinstance(value := schema.get(keyword), int) and value >= 0 else None
