"""A job's output as its watchers hold it, and how often a part of it was replaced. Offsets count UTF-8 bytes."""


class Transcript:
    """The output so far. It is cut back only where it turns out to be wrong.

    Gateways and the worker build it from the same records of the feed, so that they agree on what was replaced.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        """The output. Read-only."""
        self.cuts: list[int] = []
        """The offsets where the output was cut back, in order. Read-only."""
        self.rewinds = 0
        """How often watchers had to rewind, as counted here and elsewhere."""
        self.lowest_rewind = 0
        """The lowest offset that watchers had to rewind to. 0 without rewinds."""

    def put(self, offset: int, text: str) -> None:
        """Put text at an offset. Nothing changes if the output before it is unknown.

        An attempt that starts over repeats text. While the text is the same nothing changes, so nobody has to rewind.
        From the first difference on, the output is the new attempt's.
        """
        new, size = text.encode(), len(self.data)
        if offset == size:
            self.data += new
            return
        if offset > size:
            return
        known = self.data[offset : offset + len(new)]
        same = _same_bytes(known, new)
        if same < len(known):
            self._cut(offset + same)
            same = len(self.data) - offset
        self.data += new[same:]

    def settle(self, output: str) -> None:
        """Set the whole output, which is durable now."""
        self.put(0, output)
        if len(self.data) > (size := len(output.encode())):
            self._cut(size)

    def add_rewinds(self, rewinds: int, lowest: int) -> None:
        """Merge the rewinds that were counted elsewhere, where more of the output's history was seen."""
        if rewinds:
            self.lowest_rewind = min(self.lowest_rewind, lowest) if self.rewinds else lowest
            self.rewinds = max(self.rewinds, rewinds)

    def _cut(self, offset: int) -> None:
        del self.data[character_start(self.data, offset) :]
        self.cuts.append(len(self.data))
        self.lowest_rewind = min(self.lowest_rewind, len(self.data)) if self.rewinds else len(self.data)
        self.rewinds += 1


def character_start(data: bytearray, offset: int) -> int:
    """Return the offset at which the character around an offset begins."""
    while 0 < offset < len(data) and data[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset


def _same_bytes(left: bytes | bytearray, right: bytes) -> int:
    """Return how many bytes the two have in common at their beginning."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(index for index in range(size) if left[index] != right[index])
