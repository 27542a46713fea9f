"""Payloads as JSON, and back. What cannot be converted is returned as it is, byte for byte."""

import json
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from temporalio.api.common.v1 import Payload

from payload_converter._types import MessageType, known


def decode_payload(payload: Payload) -> Payload:
    """Return `binary/protobuf` of a known type as JSON, anything else as it is.

    Most types become `json/protobuf` and keep their `messageType`, so that encode_payload finds the way back. Types
    that JSON writes as a string or a number, such as google.protobuf.Timestamp, become `json/plain` without it: the
    CLI prints `json/protobuf` only as an object, and `json/plain` only with no other metadata. Fields that this
    process does not know are not shown.
    """
    message_type = _readable(payload, b"binary/protobuf")
    if message_type is None:
        return payload
    try:
        # TypeError: a google.protobuf.Any holds a type that is not known here. ValueError: a time past year 9999.
        value: Any = json_format.MessageToDict(message_type.pb2.FromString(payload.data))
    except (DecodeError, json_format.Error, TypeError, ValueError):
        return payload
    data = json.dumps(value).encode()
    if isinstance(value, dict):
        return _with_data(payload, "json/protobuf", data)
    return Payload(metadata={"encoding": b"json/plain"}, data=data)


def encode_payload(payload: Payload) -> Payload:
    """Return `json/protobuf` of a known type as `binary/protobuf`, anything else as it is.

    The Web UI sends what its user typed, or a decoded payload of an earlier run ("start one like this").
    """
    message_type = _readable(payload, b"json/protobuf")
    if message_type is None:
        return payload
    try:
        message = json_format.Parse(payload.data, message_type.pb2())
    except (json_format.ParseError, ValueError, RecursionError):
        return payload
    return _with_data(payload, "binary/protobuf", message.SerializeToString())


def _readable(payload: Payload, encoding: bytes) -> MessageType | None:
    """Return the type that the payload names, if it has this encoding and the type is known."""
    if payload.metadata.get("encoding") != encoding:
        return None
    return known(payload.metadata.get("messageType", b"").decode(errors="replace"))


def _with_data(payload: Payload, encoding: str, data: bytes) -> Payload:
    """Return a copy that keeps all other metadata."""
    copy = Payload()
    copy.CopyFrom(payload)
    copy.metadata["encoding"] = encoding.encode()
    copy.data = data
    return copy
