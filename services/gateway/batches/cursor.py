"""The cursor of StreamBatchResults: which items a reader has.

A chunk's items end in any order, and its segments are rewritten meanwhile, so that only the set of items that were
delivered says where a reader is. It is small: all chunks before one number, and the bits of some chunks after it.
"""

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from llm_pb import internal_pb2
from services.gateway import cursor_text

_MAX_BYTES: Final = 1_500_000
"""Maximum size of a cursor's content before it is compressed. Watched items come last in a plan and run at the same
time as the others, so a cursor may hold the bits of all chunks: 18 bytes for each, 1.4 MB for ten million lines."""
_MAX_CHUNKS: Final = 100_000
"""Maximum number of chunks a cursor holds. Half a million in a cursor of 3 kB would hold the event loop for 0.2 s."""


class Cursor:
    """What one reader has."""

    def __init__(self, batch_id: str, text: str = "") -> None:
        """Raises cursor_text.BadCursor."""
        self._batch_id = batch_id
        self.low = 0
        """All items of chunks with lower numbers were delivered."""
        self._bits: dict[int, int] = {}
        self.rest = 0
        """Number of items delivered of those that no chunk has."""
        self._create_time = Timestamp()
        if text:
            self._read(text)

    def is_of_another_run(self, create_time: Timestamp) -> bool:
        """Return whether the cursor is of an earlier run of the batch. Then it has nothing of the present one."""
        other = self._create_time not in (Timestamp(), create_time)
        if other:
            self.low, self._bits, self.rest = 0, {}, 0
        self._create_time = create_time
        return other

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
        packed = [b""] * (max(self._bits, default=self.low - 1) + 1 - self.low)
        for chunk, bits in self._bits.items():
            packed[chunk - self.low] = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
        state = internal_pb2.ResultsCursor(low=self.low, rest=self.rest, bits=packed, create_time=self._create_time)
        return cursor_text.encode(self._batch_id, state)

    def _read(self, text: str) -> None:
        state = cursor_text.decode(self._batch_id, text, internal_pb2.ResultsCursor, _MAX_BYTES)
        if len(state.bits) > _MAX_CHUNKS:
            raise cursor_text.BadCursor("the cursor holds more chunks than a batch has")
        self.low, self.rest, self._create_time = max(state.low, 0), max(state.rest, 0), state.create_time
        for index, bits in enumerate(state.bits):
            if bits:
                self._bits[self.low + index] = int.from_bytes(bits, "little")
