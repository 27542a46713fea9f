"""Finds custom_ids that occur twice, in about 20 to 60 bytes of memory an id."""

import hashlib
from array import array
from typing import Final

_EMPTY: Final = 0xFFFFFFFF


class CustomIds:
    """A hash table of the 128-bit digests of custom_ids, with the line of each. Two ids do not share a digest."""

    def __init__(self) -> None:
        self._count = 0
        self._mask = 0
        self._high, self._low, self._line = array("Q"), array("Q"), array("I")
        self._grow(1024)

    def add(self, custom_id: str, line: int) -> int | None:
        """Remember an id and return None; or return the line that has it already."""
        high, low = _digest(custom_id)
        place = self._find(high, low)
        if self._line[place] != _EMPTY:
            return self._line[place]
        self._high[place], self._low[place], self._line[place] = high, low, line
        self._count += 1
        if self._count * 3 > len(self._line) * 2:
            self._grow(2 * len(self._line))
        return None

    def _find(self, high: int, low: int) -> int:
        """Return the place of a digest, or the free one where it belongs."""
        place = low & self._mask
        while self._line[place] != _EMPTY and (self._low[place] != low or self._high[place] != high):
            place = (place + 1) & self._mask
        return place

    def _grow(self, size: int) -> None:
        """Make the table as large as `size`, a power of two."""
        known = zip(self._high, self._low, self._line, strict=True)
        self._mask = size - 1
        self._high, self._low = array("Q", bytes(8 * size)), array("Q", bytes(8 * size))
        self._line = array("I", [_EMPTY]) * size
        for high, low, line in known:
            if line != _EMPTY:
                place = self._find(high, low)
                self._high[place], self._low[place], self._line[place] = high, low, line


def _digest(custom_id: str) -> tuple[int, int]:
    data = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    return int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
