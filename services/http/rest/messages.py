"""Messages of llm.proto as the JSON of the REST API: proto3 JSON with the names of llm.proto, and with every field.

A field that is not set is there with its default, except for messages and for fields that tell unset from zero.
"""

import base64
from typing import Any

from google.protobuf import any_pb2, json_format

# The details of a status, and what pipelines take and return, are of types that json_format looks up by name.
from google.protobuf import struct_pb2 as struct_pb2
from google.protobuf import wrappers_pb2 as wrappers_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as error_details_pb2
from starlette.responses import JSONResponse


def to_json(message: Message) -> dict[str, Any]:
    """Return a message as a value of JSON."""
    try:
        return _fields(message)
    except TypeError:
        return _with_unknown_types(message)


def _fields(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return value


def _with_unknown_types(message: Message) -> dict[str, Any]:
    """Return a message that holds a value of an operator's own type, which stays in base64."""
    if isinstance(message, any_pb2.Any):
        return {"@type": message.type_url, "value": base64.b64encode(message.value).decode()}
    rest, parts = type(message)(), dict[str, Any]()
    rest.CopyFrom(message)
    for field, value in message.ListFields():
        if field.message_type is not None and not field.is_repeated:
            rest.ClearField(field.name)
            parts[field.name] = to_json(value)
    return {**_fields(rest), **parts}


def answer_with(message: Message, status: int = 200, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the answer that holds a message."""
    return JSONResponse(to_json(message), status, {"Cache-Control": "no-store", **(headers or {})})
