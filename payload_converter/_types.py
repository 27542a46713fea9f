"""Finds the message type that a type hint or a payload's `messageType` names."""

from dataclasses import dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from google.protobuf import symbol_database
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

# Imported so that this process knows the types: the API's, and what its google.rpc.Status details hold.
from google.rpc import error_details_pb2 as _error_details_pb2  # noqa: F401

from llm_pb import internal_pb2 as _internal_pb2  # noqa: F401
from llm_pb import llm_pb2 as _llm_pb2  # noqa: F401
from llm_pb import schedule_pb2 as _schedule_pb2  # noqa: F401
from payload_converter import _betterproto
from payload_converter._errors import PayloadError

_WIRE_START_GROUP = 3


@dataclass(frozen=True)
class MessageType:
    """A protobuf message type and the Python class that stands for it."""

    full_name: str
    """For example "llm.v1.JobRequest"."""
    pb2: type[Message]
    """Reads and writes the bytes, whatever `cls` is."""
    cls: type[Any]
    """What the caller works with: `pb2` itself, or a betterproto class."""

    def from_pb2(self, message: Message, data: bytes) -> Any:
        """Return the message as an instance of `cls`. `data` is the message's bytes, unknown fields included.

        betterproto reads the bytes again, but only those that upb took: it accepts most truncated input itself.
        Raises ValueError when betterproto would read something else than protobuf does, or cannot read it.
        """
        if self.cls is self.pb2:
            return message
        _refuse_ambiguous(message)
        try:
            return self.cls.FromString(data)
        except Exception as err:  # betterproto has no error of its own: OverflowError for a time past year 9999, ...
            raise ValueError(f"betterproto cannot hold it: {err!r}") from err


def known(full_name: str) -> MessageType | None:
    """Return the pb2 type of this name, None when no imported module defines it."""
    try:
        cls: type[Message] = symbol_database.Default().GetSymbol(full_name)
    except KeyError:
        return None
    return MessageType(full_name, cls, cls)


def of_class(cls: Any) -> MessageType | None:
    """Return the type that a class stands for, None when it is no message class.

    Raises RuntimeError for a betterproto class whose protobuf type is not known here.
    """
    return _of_class(cls) if isinstance(cls, type) else None


@lru_cache(maxsize=1024)
def _of_class(cls: type) -> MessageType | None:
    if issubclass(cls, Message):
        descriptor: Descriptor | None = getattr(cls, "DESCRIPTOR", None)
        return MessageType(descriptor.full_name, cls, cls) if descriptor is not None else None
    if not _betterproto.is_class(cls):
        return None
    for name in _betterproto.possible_names(cls):
        if found := known(name):
            return MessageType(name, found.pb2, cls)
    raise RuntimeError(
        f"no protobuf type is known for the betterproto class {cls.__module__}.{cls.__qualname__}: "
        "import the _pb2 module generated from the same proto file"
    )


class Expected:
    """What a type hint allows."""

    def __init__(self, hint: Any) -> None:
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        self.none = NoneType in members
        """Whether None is allowed by name."""
        self.anything = any(member in (None, Any, object, Message) or isinstance(member, TypeVar) for member in members)
        """Whether any message will do: no hint is one such."""
        self.messages = tuple(found for member in members if (found := of_class(member)))
        """The message types allowed by name."""
        self._members = members

    def __str__(self) -> str:
        """The hint, message types by their protobuf names."""
        return " | ".join(_name(member) for member in self._members)

    def pick(self, full_name: str) -> MessageType:
        """Return the type that a payload of this `messageType` becomes.

        Raises PayloadError when the hint does not allow it, RuntimeError when nobody here knows it.
        """
        for allowed in self.messages:
            if allowed.full_name == full_name:
                return allowed
        if not self.anything:
            raise PayloadError(f"expected {self}, but the payload is a {full_name}")
        if found := known(full_name):
            return found
        raise RuntimeError(
            f"unknown message type {full_name}: import the _pb2 module that defines it, or deploy newer code"
        )


def _name(member: Any) -> str:
    if found := of_class(member):
        return found.full_name
    return "None" if member is NoneType else getattr(member, "__qualname__", str(member))


def _refuse_ambiguous(message: Message) -> None:
    """Raise ValueError for what upb keeps aside as unknown but betterproto would take for a known field.

    That is a field of a wrong wire type (betterproto stores the wrong Python type), and a group (it reads the inner
    fields as the message's own).
    """
    unknown_fields = UnknownFieldSet(message)
    for unknown in (unknown_fields[index] for index in range(len(unknown_fields))):
        if unknown.field_number in message.DESCRIPTOR.fields_by_number or unknown.wire_type == _WIRE_START_GROUP:
            raise ValueError(f"field {unknown.field_number} of {message.DESCRIPTOR.full_name} has a wrong wire type")
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if not field.is_repeated:
            _refuse_ambiguous(value)
        elif not field.message_type.GetOptions().map_entry:
            for item in value:
                _refuse_ambiguous(item)
        elif field.message_type.fields_by_name["value"].message_type is not None:
            for item in value.values():
                _refuse_ambiguous(item)
