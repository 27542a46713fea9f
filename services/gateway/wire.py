"""How many fields a request holds, counted on its bytes before they are parsed.

A field takes two bytes on the wire and up to a hundred once parsed, and whatever walks the message afterwards takes
longer still. So a request is refused by the number of its fields before protobuf sees it.
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
    """Return how many fields a message of the type holds on the wire, those of its messages included.

    Counting ends above `most`, so that it takes milliseconds whatever the bytes are. A packed field counts for each of
    its bytes. Unknown fields count, what is inside them does not, unless it is a group.

    Raises DecodeError for bytes that are no message of any type; protobuf refuses more than that.
    """
    count = 0
    # Descriptors have a type of their own in each implementation of protobuf.
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
                        # What is inside an unknown group belongs to no known type.
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
    """Return the number at a place and the place after it."""
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DecodeError("a number of more than ten bytes")
