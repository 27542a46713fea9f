"""Names of values of enums, those of later versions of the API included."""

from typing import Any


def name_of(enum: Any, value: int, prefix: str = "") -> str:
    """Return the name of a value without a prefix; its number where this version does not know it."""
    known = enum.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix(prefix) if known is not None else str(value)
