"""The converter: a class for each encoding, their composite, and one exported constant."""

from collections.abc import Sequence
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from temporalio.api.common.v1 import Payload
from temporalio.converter import (
    BinaryProtoPayloadConverter,
    CompositePayloadConverter,
    DataConverter,
    DefaultPayloadConverter,
    EncodingPayloadConverter,
    JSONPlainPayloadConverter,
    JSONProtoPayloadConverter,
)

from payload_converter._errors import MAX_PAYLOAD_BYTES, PayloadError
from payload_converter._types import Expected, MessageType, of_class

_FRAME_BYTES: Final = 4  # the tag and the length that stand before each payload of a call, up to 2 MiB
_ENCRYPTION_BYTES: Final = 256
"""What encryption adds to a payload at most: nonce, tag, and the names of encoding, key and tenant."""
ENCRYPTED: Final = b"binary/encrypted"
"""The encoding of what payload_converter.encryption writes."""


class BinaryMessageConverter(EncodingPayloadConverter):
    """Writes messages as `binary/protobuf` and reads them, fields that this process does not know included."""

    encoding = "binary/protobuf"

    def to_payload(self, value: Any) -> Payload | None:
        """Return the payload of a pb2 or betterproto message, None for any other value.

        Raises RuntimeError when protobuf does not know the betterproto class, PayloadError when betterproto writes
        bytes that protobuf refuses: better here than at the reader.
        """
        message_type = of_class(type(value))
        if message_type is None:
            return None
        data = value.SerializeToString()
        if message_type.cls is not message_type.pb2:
            try:
                message_type.pb2.FromString(data)
            except DecodeError as err:
                raise PayloadError(f"betterproto wrote a broken {message_type.full_name}: {err}") from err
        metadata = {"encoding": self.encoding.encode(), "messageType": message_type.full_name.encode()}
        return Payload(metadata=metadata, data=data)

    def from_payload(self, payload: Payload, type_hint: Any = None) -> Any:
        """Return the message, as the hinted class or, without a hint, as the pb2 class that `messageType` names.

        Raises PayloadError when type or bytes are not what the hint says, RuntimeError for an unknown type.
        """
        expected = Expected(type_hint)
        declared = _message_type(payload)
        if not declared:
            raise PayloadError(
                f"expected {expected}, but the {self.encoding} payload has no messageType and could be anything: "
                "let the sender's converter write it"
            )
        target = expected.pick(declared)
        _check_size(payload, target, expected)
        try:
            return target.from_pb2(target.pb2.FromString(payload.data), payload.data)
        except (DecodeError, ValueError) as err:
            raise _unreadable(payload, expected, err) from err


class JSONMessageConverter(EncodingPayloadConverter):
    """Reads `json/protobuf`, which other SDKs write by default. Writes nothing: JSON drops unknown fields."""

    encoding = "json/protobuf"

    def to_payload(self, value: Any) -> Payload | None:
        """Return None: messages are written by BinaryMessageConverter."""
        return None

    def from_payload(self, payload: Payload, type_hint: Any = None) -> Any:
        """Return the message, as BinaryMessageConverter does.

        `messageType` may be missing where the hint names one type. A field that the type does not have is an error.
        """
        expected = Expected(type_hint)
        declared = _message_type(payload)
        return _from_json(payload, expected.pick(declared) if declared else _only(expected), expected)


class JSONValueConverter(JSONPlainPayloadConverter):
    """Reads plain JSON as a message where the hint asks for one, so that the CLI can start a workflow.

    Any other value, either way, is the SDK's JSONPlainPayloadConverter's.
    """

    def from_payload(self, payload: Payload, type_hint: Any = None) -> Any:
        """Return the value; for a message type, by the rules of proto3 JSON and of JSONMessageConverter."""
        expected = Expected(type_hint)
        if not expected.messages or (expected.none and payload.data.strip() == b"null"):
            return super().from_payload(payload, type_hint)
        declared = _message_type(payload)
        return _from_json(payload, expected.pick(declared) if declared else _only(expected), expected)


class EncryptedPayloadConverter(EncodingPayloadConverter):
    """Says what is wrong when an encrypted payload comes to a process that has no keys."""

    encoding = ENCRYPTED.decode()

    def to_payload(self, value: Any) -> Payload | None:
        """Return None: a codec writes encrypted payloads."""
        return None

    def from_payload(self, payload: Payload, type_hint: Any = None) -> Any:
        """Raise RuntimeError: the same process with keys can read it."""
        raise RuntimeError("the payload is encrypted and this process has no keys: set ENCRYPTION_KEY_STORE")


class MessagePayloadConverter(CompositePayloadConverter):
    """The SDK's default converters with those for messages replaced. Bounds what one call may carry."""

    added_bytes = _FRAME_BYTES
    """What is added to each payload on its way, at most."""

    def __init__(self) -> None:
        replaced: dict[type, EncodingPayloadConverter] = {
            BinaryProtoPayloadConverter: BinaryMessageConverter(),
            JSONProtoPayloadConverter: JSONMessageConverter(),
            JSONPlainPayloadConverter: JSONValueConverter(),
        }
        defaults = DefaultPayloadConverter.default_encoding_payload_converters
        converters = (replaced.get(type(default), default) for default in defaults)
        super().__init__(*converters, EncryptedPayloadConverter())

    def to_payloads(self, values: Sequence[Any]) -> list[Payload]:
        """Return one payload for each value.

        Raises PayloadError when together they exceed MAX_PAYLOAD_BYTES. The server would refuse them, and a worker
        would try the same again for ever.
        """
        payloads = super().to_payloads(values)
        size = sum(payload.ByteSize() + self.added_bytes for payload in payloads)
        if size > MAX_PAYLOAD_BYTES:
            names = ", ".join(
                _message_type(payload) or type(value).__name__ for payload, value in zip(payloads, values, strict=True)
            )
            raise PayloadError(
                f"{names}: {size} bytes, over Temporal's limit of {MAX_PAYLOAD_BYTES}: send less, or a reference"
            )
        return payloads


class EncryptedMessagePayloadConverter(MessagePayloadConverter):
    """The same for payloads that a codec encrypts afterwards, which makes them a little larger."""

    added_bytes = _FRAME_BYTES + _ENCRYPTION_BYTES


def _message_type(payload: Payload) -> str:
    return payload.metadata.get("messageType", b"").decode(errors="replace")


def _only(expected: Expected) -> MessageType:
    """Return the one type that JSON without a `messageType` can be."""
    if len(expected.messages) == 1:
        return expected.messages[0]
    raise PayloadError(f"expected {expected}, but the JSON payload has no messageType to tell which message it is")


def _from_json(payload: Payload, target: MessageType, expected: Expected) -> Any:
    _check_size(payload, target, expected)
    message = target.pb2()
    try:
        # json_format takes [] and "" for an empty message. Only well-known types are written as something else.
        if not payload.data.lstrip().startswith(b"{") and not target.full_name.startswith("google.protobuf."):
            raise json_format.ParseError("it is not a JSON object")
        json_format.Parse(payload.data, message)
        return target.from_pb2(message, message.SerializeToString())
    except (json_format.ParseError, ValueError, RecursionError) as err:
        raise _unreadable(payload, expected, err) from err


def _check_size(payload: Payload, target: MessageType, expected: Expected) -> None:
    if payload.ByteSize() > MAX_PAYLOAD_BYTES:
        raise PayloadError(
            f"expected {expected}, but the {target.full_name} payload has {payload.ByteSize()} bytes, "
            f"over the limit of {MAX_PAYLOAD_BYTES}"
        )


def _unreadable(payload: Payload, expected: Expected, cause: Exception) -> PayloadError:
    encoding = payload.metadata["encoding"].decode(errors="replace")
    held = " ".join(filter(None, [encoding, _message_type(payload)]))
    reason = " ".join(str(cause).split())
    return PayloadError(f"expected {expected}, but the {held} payload cannot be read: {reason}")


data_converter: Final = DataConverter(payload_converter_class=MessagePayloadConverter)
"""Pass it as `data_converter` to temporalio.client.Client; workers take it from their client."""
