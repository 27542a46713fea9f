"""The text of a cursor: a message that its stream alone can read back."""

import base64
import binascii
import hashlib
import zlib
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

M = TypeVar("M", bound=Message)
_TAG_BYTES: Final = 8
_MAX_BYTES: Final = 64 * 1024


class BadCursor(ValueError):
    """The cursor is of another stream, or none at all."""


def encode(stream: str, state: Message) -> str:
    """Return the text of a cursor. `stream` is what it belongs to."""
    data = zlib.compress(state.SerializeToString(), 9)
    return base64.urlsafe_b64encode(_tag(stream) + data).decode().rstrip("=")


def decode(stream: str, text: str, kind: type[M], max_bytes: int = _MAX_BYTES) -> M:
    """Return what encode() got, a message of at most `max_bytes`. Raises BadCursor."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        if data[:_TAG_BYTES] != _tag(stream):
            raise BadCursor("the cursor is of another one")
        inflater = zlib.decompressobj()
        unpacked = inflater.decompress(data[_TAG_BYTES:], max_bytes)
        if not inflater.eof or inflater.unused_data:
            raise BadCursor("the cursor is not whole")
        return kind.FromString(unpacked)
    except BadCursor:
        raise
    except (binascii.Error, ValueError, zlib.error, DecodeError):
        raise BadCursor("the cursor cannot be read") from None


def _tag(stream: str) -> bytes:
    return hashlib.sha256(stream.encode()).digest()[:_TAG_BYTES]
