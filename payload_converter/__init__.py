"""Protobuf and betterproto messages as Temporal payloads.

Pass `data_converter` to the client and every worker of that client speaks it:

    client = await Client.connect("127.0.0.1:7233", data_converter=data_converter)

Messages are written as `binary/protobuf` with their `messageType`; `json/protobuf` and `json/plain` are read as well.
Every other value goes the way of the SDK's default converter. The README has the rules, the table of other languages
and the codec server, which shows the messages as JSON in the Web UI and the CLI.
"""

from payload_converter._converter import MessagePayloadConverter, data_converter
from payload_converter._errors import MAX_PAYLOAD_BYTES, PAYLOAD_ERROR_TYPE, PayloadError

__all__ = ["MAX_PAYLOAD_BYTES", "PAYLOAD_ERROR_TYPE", "MessagePayloadConverter", "PayloadError", "data_converter"]
