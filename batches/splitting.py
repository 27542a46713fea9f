"""Cuts a file into lines as its bytes come."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line of a file."""

    index: int
    """Its number, from 0. Blank lines count."""
    offset: int
    """Where it begins in the file, in bytes."""
    length: int
    """Its size in bytes, without the end of the line."""
    data: bytes | None
    """Its bytes; None for a line over the maximum."""


class LineSplitter:
    """Yields the lines of a file that are not blank. It keeps one line of at most `max_line_bytes` in memory.

    A line ends with LF; a CR before it is white space of the line.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._index = 0
        self._offset = 0
        self._length = 0
        self._pieces: list[bytes] = []
        self._blank = True

    @property
    def size(self) -> int:
        """Number of bytes so far."""
        return self._offset + self._length

    def feed(self, data: bytes) -> Iterator[RawLine]:
        """Yield the lines that end in the next bytes of the file."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._add(data[start:end])
            yield from self._end()
            start = end + 1
        self._add(data[start:])

    def close(self) -> Iterator[RawLine]:
        """Yield the last line, if the file does not end with the end of a line."""
        if self._length:
            yield from self._end()

    def _add(self, piece: bytes) -> None:
        self._length += len(piece)
        self._blank = self._blank and not piece.strip()
        if self._length > self._max or self._blank:
            self._pieces.clear()
        else:
            # White space before it is dropped, which JSON ignores.
            self._pieces.append(piece)

    def _end(self) -> Iterator[RawLine]:
        if not self._blank:
            data = None if self._length > self._max else b"".join(self._pieces)
            yield RawLine(self._index, self._offset, self._length, data)
        self._index += 1
        self._offset += self._length + 1
        self._length, self._blank = 0, True
        self._pieces.clear()
