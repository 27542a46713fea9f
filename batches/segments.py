"""Segments: files of results that chunks write while they run, merged by the lines of the input.

A segment holds items as serialized BatchItem, each after its size as a varint, ordered by index.
"""

import heapq
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import IO, Any, Final

from google.protobuf import proto
from google.protobuf.message import DecodeError

from llm_pb import batch_pb2

_MAX_VARINT_BYTES: Final = 5


class DamagedSegment(ValueError):
    """A segment was cut, or holds what is no result, or holds a line that was there before."""


def to_segment(items: Iterable[batch_pb2.BatchItem]) -> bytes:
    """Return the segment of some items, in whatever order they come."""
    out = BytesIO()
    for item in sorted(items, key=_index):
        proto.serialize_length_prefixed(item, out)
    return out.getvalue()


def read_segment(file: IO[bytes]) -> Iterator[batch_pb2.BatchItem]:
    """Yield the items of a segment. Raises DamagedSegment."""
    # Its annotations say BytesIO, and leave out the None at the end.
    parse_next: Any = proto.parse_length_prefixed
    while True:
        try:
            item = parse_next(batch_pb2.BatchItem, file)
        except Exception as error:  # protobuf's errors of a message that was cut have no common class
            raise DamagedSegment(f"a segment cannot be read: {error}") from error
        if item is None:
            return
        yield item


class SegmentParser:
    """Reads the items of a segment as its bytes come. It keeps one item, and a piece, in memory."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[batch_pb2.BatchItem]:
        """Yield the items that end in the next bytes. Raises DamagedSegment."""
        self._rest += data
        start = 0
        while (place := _frame(self._rest, start)) is not None:
            begin, end = place
            if end > len(self._rest):
                break
            try:
                yield batch_pb2.BatchItem.FromString(bytes(self._rest[begin:end]))
            except DecodeError as error:
                raise DamagedSegment(f"a segment cannot be read: {error}") from error
            start = end
        del self._rest[:start]

    def close(self) -> None:
        """Raises DamagedSegment for a segment that was cut."""
        if self._rest:
            raise DamagedSegment("a segment was cut")


def _frame(data: bytearray, start: int) -> tuple[int, int] | None:
    """Return where a message begins and ends whose size stands at a place; None if the size was cut."""
    size = 0
    for index in range(_MAX_VARINT_BYTES):
        if start + index >= len(data):
            return None
        byte = data[start + index]
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return start + index + 1, start + index + 1 + size
    raise DamagedSegment("a segment has a size that is none")


def merge(segments: Iterable[Iterable[batch_pb2.BatchItem]]) -> Iterator[batch_pb2.BatchItem]:
    """Yield the items of some segments by index. Raises DamagedSegment for a line that is there twice.

    It keeps one item of each segment in memory.
    """
    last = -1
    for item in heapq.merge(*segments, key=_index):
        if item.index <= last:
            raise DamagedSegment(f"line {item.index} has two results, or a segment is not ordered")
        last = item.index
        yield item


def merged_pieces(segments: Iterable[Iterable[batch_pb2.BatchItem]], piece_bytes: int = 1 << 20) -> Iterator[bytes]:
    """Yield the pieces of one segment that holds what some segments hold. A piece has about `piece_bytes`."""
    out = BytesIO()
    for item in merge(segments):
        proto.serialize_length_prefixed(item, out)
        if out.tell() >= piece_bytes:
            yield out.getvalue()
            out = BytesIO()
    if out.tell():
        yield out.getvalue()


def _index(item: batch_pb2.BatchItem) -> int:
    return item.index
