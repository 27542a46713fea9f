"""Whether JSON has the form that a JSON Schema asks for, as far as code that reads it depends on that."""

import math
from typing import Any, Final

_KINDS: Final = {"string": str, "boolean": bool, "object": dict, "array": list, "null": type(None)}


def misfit(value: Any, schema: Any, place: str = "") -> str | None:
    """Return the first thing in a value that a schema does not allow, in words; None for a value that fits.

    Of the keywords only these are understood: type, required, properties and items. What a text says, and how long or
    large something is, does not matter here. The words name properties of the schema, and nothing of the value.
    """
    here = place or "it"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{here} is no finite number"
    if not isinstance(schema, dict):
        return None
    kinds = schema.get("type")
    allowed = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    if allowed and not any(_is(value, kind) for kind in allowed):
        return f"{here} must be of the type {' or '.join(map(str, allowed))}"
    if isinstance(value, dict):
        return _misfit_within(value, schema, place)
    items = schema.get("items")
    if isinstance(value, list) and isinstance(items, dict) and "prefixItems" not in schema:
        found = (misfit(item, items, f"{place}[{number}]") for number, item in enumerate(value))
        return next(filter(None, found), None)
    return None


def _misfit_within(value: dict[str, Any], schema: dict[str, Any], place: str) -> str | None:
    below = f"{place}." if place else ""
    required, properties = schema.get("required"), schema.get("properties")
    for name in required if isinstance(required, list) else ():
        if name not in value:
            return f"{below}{name} is missing"
    for name, schema_of in properties.items() if isinstance(properties, dict) else ():
        if name in value and (wrong := misfit(value[name], schema_of, f"{below}{name}")) is not None:
            return wrong
    return None


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type of JSON Schema. Of a type that it does not have, everything is."""
    if kind in ("number", "integer"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or isinstance(value, int) or value.is_integer())
    return isinstance(value, _KINDS[kind]) if isinstance(kind, str) and kind in _KINDS else True
