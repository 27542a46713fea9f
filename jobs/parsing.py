"""JSON of callers as messages of llm.proto. Every bad field is named at once.

The JSON is protobuf's: names may be those of llm.proto or in camelCase, numbers may be texts.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, Final, TypeVar

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from jobs.field_rules import DEPTH, Violation

M = TypeVar("M", bound=Message)

_MAX_VIOLATIONS: Final = 100
_EXPECTED: Final = {
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_BYTES: "bytes in base64",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_INT32: "a whole number of 32 bits",
    FieldDescriptor.TYPE_INT64: "a whole number of 64 bits",
    FieldDescriptor.TYPE_STRING: "a text",
}
_REFUSED: Final = (json_format.ParseError, ValueError, TypeError, AttributeError, KeyError, SystemError)
"""What protobuf raises for JSON that is no message: AttributeError for an "@type" that is no text, KeyError for an Any
without its "value", SystemError for half a surrogate pair as the name of an enum."""
_NUMBERS: Final = (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)
_NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?|NaN|-?Infinity")
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
_WELL_KNOWN: Final = {
    "google.protobuf.Any": f'an object whose "@type" is a type that is known here, with the JSON of that type, {DEPTH}',
    "google.protobuf.Duration": 'a duration in seconds, such as "1.5s"',
    "google.protobuf.Timestamp": 'a time of RFC 3339, such as "2026-11-26T06:00:00Z"',
}


class InvalidFields(ValueError):
    """JSON is no message. It may name no field, where protobuf alone refuses it."""

    def __init__(self, message: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)
        """The bad fields: at most 100."""


def parse(value: dict[str, Any], message: M) -> M:
    """Fill a message from JSON and return it.

    Raises InvalidFields for unknown fields and for values of a wrong type.
    """
    if wrong := list(islice(_wrong(value, message.DESCRIPTOR, ""), _MAX_VIOLATIONS)):
        raise InvalidFields("; ".join(f"{field} {description}" for field, description in wrong), wrong)
    try:
        return json_format.ParseDict(value, message)
    except _REFUSED as error:
        # What was not found above. The words of the error are protobuf's.
        raise InvalidFields(f"is no {message.DESCRIPTOR.name} of llm.proto: it may be {DEPTH}") from error


def _wrong(value: dict[str, Any], descriptor: Any, path: str) -> Iterator[Violation]:
    """Yield what is wrong with the fields of an object, those of its objects included."""
    known = _fields(descriptor)
    seen: set[str] = set()
    chosen: dict[str, str] = {}
    for key, item in value.items():
        field = known.get(key)
        if field is None:
            yield Violation(f"{path}{key}", f"is no field of {descriptor.name}")
            continue
        place = f"{path}{field.name}"
        if field.name in seen:
            yield Violation(place, "is there more than once, under its two names")
        seen.add(field.name)
        if item is None:
            continue
        if (oneof := field.containing_oneof) is not None and (
            first := chosen.setdefault(oneof.name, field.name)
        ) != field.name:
            yield Violation(place, f"must not be set together with {first}: remove one")
        if _is_map(field):
            if not isinstance(item, dict):
                yield Violation(place, "must be an object")
                continue
            entry: Any = field.message_type
            for name, element in item.items():
                of_name = f"{place}[{json.dumps(name)}]"
                if element is None:
                    yield Violation(of_name, "must not be null")
                else:
                    yield from _wrong_value(element, entry.fields_by_name["value"], of_name)
        elif field.is_repeated:
            if not isinstance(item, list):
                yield Violation(place, "must be a list")
                continue
            for index, element in enumerate(item):
                yield from _wrong_value(element, field, f"{place}[{index}]")
        else:
            yield from _wrong_value(item, field, place)


@cache
def _fields(descriptor: Any) -> dict[str, FieldDescriptor]:
    """Return the fields of a message by both of their names."""
    return {name: field for field in descriptor.fields for name in (field.name, field.json_name)}


def _wrong_value(value: Any, field: FieldDescriptor, place: str) -> Iterator[Violation]:
    message = field.message_type
    if message is not None and message.full_name not in _WELL_KNOWN:
        if isinstance(value, dict):
            yield from _wrong(value, message, f"{place}.")
        else:
            yield Violation(place, "must be an object")
        return
    if isinstance(value, str) and field.type in _NUMBERS and _NUMBER.fullmatch(value) is None:
        # Python takes more for a number than JSON does.
        yield Violation(place, f"must be {_expected(field)}")
        return
    if _is_plain(value, field):
        return
    owner: Any = field.containing_type
    try:
        holder = GetMessageClass(owner)()
        json_format.ParseDict({field.name: [value] if field.is_repeated else value}, holder)
    except _REFUSED:
        if isinstance(value, str) and _SURROGATE.search(value):
            yield Violation(place, "holds a surrogate, which is no character")
        else:
            yield Violation(place, f"must be {_expected(field)}")


def _is_plain(value: Any, field: FieldDescriptor) -> bool:
    """Return whether a value is surely one of the field's. It saves most values protobuf's slow look at each."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return isinstance(value, str) and value.isascii()
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return type(value) is float and math.isfinite(value)
    if field.enum_type is not None:
        return isinstance(value, str) and value.isascii() and value in field.enum_type.values_by_name
    return type(value) is bool if field.type == FieldDescriptor.TYPE_BOOL else False


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _expected(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        return _WELL_KNOWN[field.message_type.full_name]
    if field.enum_type is not None:
        return f"one of {', '.join(value.name for value in field.enum_type.values if value.number)}"
    return _EXPECTED[field.type]
