"""Counts the fields of a request on its bytes, before they are parsed.

A field takes two bytes on the wire and up to a hundred once parsed, and code that walks the message takes even longer.
So a request with too many fields is refused before protobuf parses it.
"""

from enum import IntEnum
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message


class _Wire(IntEnum):
    """The wire types of protobuf's encoding."""

    VARINT = 0
    FIXED64 = 1
    LENGTH_DELIMITED = 2
    START_GROUP = 3
    END_GROUP = 4
    FIXED32 = 5


_MAX_VARINT_BYTES: Final = 10
_MAX_TAG: Final = 2**32 - 1


def count_fields(data: bytes, kind: type[Message], most: int) -> int:
    """Return the number of fields that a message of the type holds on the wire, nested messages included.

    The count stops above `most`, so that it takes milliseconds for any bytes. A packed field counts once for each of
    its bytes. An unknown field counts once, without its content. Only the content of an unknown group counts.

    Raises DecodeError for bytes that are no message of any type. Protobuf refuses more than these.
    """
    count = 0
    # Each implementation of protobuf has its own type for descriptors.
    pending: list[tuple[int, int, Any]] = [(0, len(data), kind.DESCRIPTOR)]
    try:
        while pending:
            at, end, descriptor = pending.pop()
            open_groups = 0
            while at < end:
                count += 1
                if count > most:
                    return count
                tag, at = _varint(data, at)
                match tag & 7:
                    case _Wire.VARINT:
                        _, at = _varint(data, at)
                    case _Wire.FIXED64:
                        at += 8
                    case _Wire.LENGTH_DELIMITED:
                        size, at = _varint(data, at)
                        start, at = at, at + size
                        # The content of an unknown group belongs to no known type.
                        field = None if open_groups else descriptor.fields_by_number.get(tag >> 3)
                        if field is not None and field.type == FieldDescriptor.TYPE_MESSAGE:
                            pending.append((start, at, field.message_type))
                        elif field is not None and field.is_repeated and field.type != FieldDescriptor.TYPE_STRING:
                            count += size
                    case _Wire.START_GROUP:
                        open_groups += 1
                    case _Wire.END_GROUP:
                        open_groups -= 1
                    case _Wire.FIXED32:
                        at += 4
                    case _:
                        raise DecodeError("a field of no wire type")
                if tag > _MAX_TAG or at > end:
                    raise DecodeError("a field that is longer than its message")
    except IndexError:
        raise DecodeError("truncated") from None
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at a position, and the position after it."""
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DecodeError("a number of more than ten bytes")
