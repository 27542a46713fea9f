"""A job's output as far as a gateway knows it, and a reader's place in it. Offsets count UTF-8 bytes."""

from typing import Final

from llm_pb import llm_pb2

MAX_DELTA_BYTES: Final = 256 * 1024
"""A reader that is far behind catches up in deltas of this size: each fits a gRPC message many times over."""


class Transcript:
    """The output so far. What was put is cut back only where it turns out to be wrong."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._cuts: list[int] = []

    def put(self, offset: int, text: str) -> bool:
        """Place text at an offset; False, and no change, when what lies before it is unknown.

        An attempt that starts over repeats text. As long as it is the same text nothing changes, so nobody is told to
        rewind; from the first difference on the output is the new attempt's.
        """
        if offset > len(self._bytes):
            return False
        new = text.encode()
        known = self._bytes[offset : offset + len(new)]
        same = _same_bytes(known, new)
        if same < len(known):
            self._cut(offset + same)
            same = len(self._bytes) - offset
        self._bytes += new[same:]
        return True

    def settle(self, output: str) -> None:
        """Make this the whole output: it is durable now."""
        self.put(0, output)
        if len(self._bytes) > (size := len(output.encode())):
            self._cut(size)

    def _cut(self, offset: int) -> None:
        del self._bytes[_character_start(self._bytes, offset) :]
        self._cuts.append(len(self._bytes))


class Cursor:
    """One reader's place."""

    def __init__(self, transcript: Transcript, offset: int) -> None:
        self._transcript = transcript
        self._cuts_seen = len(transcript._cuts)
        self.offset = offset
        """Where the reader is: all before it was taken, or was known to the reader already."""

    @property
    def behind(self) -> bool:
        """Whether there is more to take."""
        return self.offset < len(self._transcript._bytes)

    def take(self, *, final: bool, most: int = MAX_DELTA_BYTES) -> llm_pb2.OutputDelta | None:
        """Return the next piece of output, of at most so many bytes, and move past it; None when there is none.

        A place inside a character is moved to its beginning, one past the end of a `final` output to its end; the
        reader is told so by rewind.
        """
        data, cuts = self._transcript._bytes, self._transcript._cuts
        start = min([self.offset, *cuts[self._cuts_seen :]])
        if start > len(data):
            if not final:
                return None
            start = len(data)
        self._cuts_seen = len(cuts)
        start = _character_start(data, start)
        rewind = start < self.offset
        end = min(start + most, len(data))
        end = _character_start(data, end)
        if start == end and not rewind:
            return None
        self.offset = end
        return llm_pb2.OutputDelta(offset=start, text=data[start:end].decode(), rewind=rewind)


def _character_start(data: bytearray, offset: int) -> int:
    """Return where the character begins that the offset lies in."""
    while 0 < offset < len(data) and data[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset


def _same_bytes(left: bytes | bytearray, right: bytes) -> int:
    """Return how many bytes the two have in common at their beginning."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(index for index in range(size) if left[index] != right[index])
