"""Messages in a workflow's memo. They are written as JSON, which every Temporal client can read.

Clients decode the memo of each workflow that they describe or list. A client without protobuf, such as TypeScript's
with its default converter, fails on a payload that it cannot read. Memos of older builds hold protobuf messages.
"""

from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

_M = TypeVar("_M", bound=Message)


def to_memo(message: Message) -> dict[str, Any]:
    """Return the message as proto3 JSON, which Temporal's converters write as `json/plain`."""
    value: dict[str, Any] = json_format.MessageToDict(message)
    return value


def from_memo(value: Any, kind: type[_M]) -> _M | None:
    """Return the message that a memo's value holds; None if the value is absent.

    Unknown fields are skipped, because a newer build may have written them. Raises ValueError for a value that is no
    such message.
    """
    if value is None or isinstance(value, kind):
        return value
    try:
        if isinstance(value, dict):
            return json_format.ParseDict(value, kind(), ignore_unknown_fields=True)
    except (json_format.ParseError, RecursionError) as error:
        raise ValueError(f"is no {kind.DESCRIPTOR.full_name}: {error}") from error
    raise ValueError(f"is no {kind.DESCRIPTOR.full_name}")


def time_from_memo(value: Any) -> Timestamp | None:
    """Return the time that a memo's value holds as RFC 3339; None if it holds none."""
    time = Timestamp()
    try:
        time.FromJsonString(value)
    except (TypeError, ValueError):
        # A workflow that was started by hand may hold anything.
        return None
    return time
