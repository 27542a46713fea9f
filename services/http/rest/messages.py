"""Messages of llm.proto as the JSON of the REST API: proto3 JSON with the names of llm.proto, and with every field.

A field that is not set is there with its default, except for messages and for fields that tell unset from zero.
"""

from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

# The details of a status are of its types, which json_format looks up by name.
from google.rpc import error_details_pb2 as error_details_pb2
from starlette.responses import JSONResponse


def to_json(message: Message) -> dict[str, Any]:
    """Return a message as a value of JSON."""
    value: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return value


def answer_with(message: Message, status: int = 200, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the answer that holds a message."""
    return JSONResponse(to_json(message), status, {"Cache-Control": "no-store", **(headers or {})})
