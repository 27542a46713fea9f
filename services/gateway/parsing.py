"""Parses bytes into request messages, so that no client's bytes cause an INTERNAL.

gRPC's own deserializer answers INTERNAL to bytes that do not parse. Most such requests hold a string that is not UTF-8.
To name the field, they are parsed once more by a schema in which every string field is a bytes field.

Parsing and checking run on the event loop, so the size of a request is bounded before: its bytes in
services.gateway.interceptor, its fields here.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Final, TypeVar

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import DecodeError, Message

from jobs.field_rules import Violation, map_path
from services.gateway.errors import invalid
from services.gateway.wire import count_fields

M = TypeVar("M", bound=Message)
MAX_FIELDS: Final = 8192
"""Maximum number of fields of one request: twice what the rules of llm.proto allow."""
_MAX_BAD_TEXTS: Final = 1000
"""Maximum number of invalid strings that are reported. A request with more is hostile, and every other call waits."""


def parse(data: bytes, kind: type[M]) -> tuple[M, list[Violation]]:
    """Return the message, and the violations of its strings that are not UTF-8.

    Each such string is "?" in the message, so that the rest can be checked. Raises ApiError INVALID_ARGUMENT for more
    than MAX_FIELDS fields, and for bytes that do not parse as this message.
    """
    name = kind.DESCRIPTOR.full_name
    try:
        if count_fields(data, kind, MAX_FIELDS) > MAX_FIELDS:
            raise invalid([Violation("", f"the request holds more than {MAX_FIELDS} fields")])
        with contextlib.suppress(DecodeError):
            return kind.FromString(data), []
        lenient = _lenient(name).FromString(data)
        violations = list(islice(_mend_texts(lenient), _MAX_BAD_TEXTS))
        if len(violations) == _MAX_BAD_TEXTS:
            raise invalid(violations)
        return kind.FromString(lenient.SerializeToString()), violations
    except DecodeError:
        rule = f"the request is not a {name}: truncated, or made from another proto file"
        raise invalid([Violation("", rule)]) from None


def _mend_texts(message: Message, path: str = "") -> Iterator[Violation]:
    for field, value in message.ListFields():
        items = value if field.is_repeated else [value]
        for index, item in enumerate(items):
            name = f"{path}{field.name}[{index}]" if field.is_repeated else f"{path}{field.name}"
            if field.message_type is not None and _is_entry(field.message_type):
                key = item.key.decode(errors="backslashreplace")
                yield from (bad._replace(field=map_path(f"{path}{field.name}", key)) for bad in _mend_texts(item))
            elif field.message_type is not None:
                yield from _mend_texts(item, f"{name}.")
            elif isinstance(item, bytes):
                try:
                    item.decode()
                except UnicodeDecodeError as error:
                    if field.is_repeated:
                        value[index] = b"?"
                    else:
                        setattr(message, field.name, b"?")
                    yield Violation(name, f"must be UTF-8: the byte at {error.start} is not")


@cache
def _lenient(name: str) -> type[Message]:
    pool = descriptor_pool.DescriptorPool()
    _add_with_bytes(pool, descriptor_pool.Default().FindMessageTypeByName(name).file, set())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def _add_with_bytes(pool: descriptor_pool.DescriptorPool, file: FileDescriptor, added: set[str]) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add_with_bytes(pool, dependency, added)
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    _take_bytes(proto.message_type)
    pool.Add(proto)


def _take_bytes(messages: Iterable[DescriptorProto]) -> None:
    for message in messages:
        # A map has no keys of bytes, so it becomes the list of its entries, which it is on the wire.
        message.options.ClearField("map_entry")
        for field in message.field:
            if field.type == FieldDescriptorProto.TYPE_STRING:
                field.type = FieldDescriptorProto.TYPE_BYTES
        _take_bytes(message.nested_type)


def _is_entry(kind: Descriptor) -> bool:
    """Return whether a message of the lenient schema is the entry of a map."""
    return bool(descriptor_pool.Default().FindMessageTypeByName(kind.full_name).GetOptions().map_entry)
