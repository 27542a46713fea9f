"""The cursor of StreamBatchResults: which items a reader has.

A chunk's items end in any order, and its segments are rewritten meanwhile, so that only the set of items that were
delivered says where a reader is. It is small: all chunks before one number, and the bits of some chunks after it.
"""

import base64
import binascii
import hashlib
import zlib
from typing import Final

from google.protobuf.message import DecodeError

from llm_pb import internal_pb2

MAX_CURSOR: Final = 4096
_TAG_BYTES: Final = 8
_MAX_BYTES: Final = 64 * 1024


class BadCursor(ValueError):
    """The cursor is of another batch, or none at all."""


class Cursor:
    """What one reader has."""

    def __init__(self, batch_id: str, text: str = "") -> None:
        """Raises BadCursor."""
        self._tag = hashlib.sha256(batch_id.encode()).digest()[:_TAG_BYTES]
        self.low = 0
        """All items of chunks with lower numbers were delivered."""
        self._bits: dict[int, int] = {}
        self.rest = 0
        """Number of items delivered of those that no chunk has."""
        if text:
            self._read(text)

    def bits(self, chunk: int) -> int:
        """Return the items delivered of a chunk, by the bits of ChunkResult.done."""
        return -1 if chunk < self.low else self._bits.get(chunk, 0)

    def deliver(self, chunk: int, place: int) -> None:
        """Note that an item was delivered, by its place within its chunk."""
        self._bits[chunk] = self._bits.get(chunk, 0) | 1 << place

    def pass_ended(self, whole: dict[int, int]) -> None:
        """Forget the first chunks whose items were all delivered. They leave `whole`, the bits of ended chunks, too."""
        while self.low in whole and not whole[self.low] & ~self._bits.get(self.low, 0):
            self._bits.pop(self.low, None)
            whole.pop(self.low)
            self.low += 1

    def encode(self) -> str:
        """Return the text of the cursor."""
        state = internal_pb2.ResultsCursor(low=self.low, rest=self.rest)
        for chunk, bits in sorted(self._bits.items()):
            while len(state.bits) < chunk - self.low:
                state.bits.append(b"")
            state.bits.append(bits.to_bytes((bits.bit_length() + 7) // 8, "little"))
        data = zlib.compress(state.SerializeToString(), 9)
        return base64.urlsafe_b64encode(self._tag + data).decode().rstrip("=")

    def _read(self, text: str) -> None:
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            if data[:_TAG_BYTES] != self._tag:
                raise BadCursor("the cursor is of another batch")
            unpacked = zlib.decompressobj().decompress(data[_TAG_BYTES:], _MAX_BYTES)
            state = internal_pb2.ResultsCursor.FromString(unpacked)
        except (binascii.Error, ValueError, zlib.error, DecodeError) as error:
            raise BadCursor(str(error)) from None
        self.low, self.rest = max(state.low, 0), max(state.rest, 0)
        for index, bits in enumerate(state.bits):
            if bits:
                self._bits[self.low + index] = int.from_bytes(bits, "little")
