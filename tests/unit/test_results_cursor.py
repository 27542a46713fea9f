"""The cursor of StreamBatchResults."""

import pytest

from llm_pb import internal_pb2
from services.gateway import cursor_text
from services.gateway.batches.cursor import Cursor
from services.gateway.cursor_text import BadCursor


def test_a_cursor_that_was_cut_or_lengthened_is_refused() -> None:
    """What it then says of the items that its reader has would be wrong."""
    cursor = Cursor("llmbatch-alice-1")
    for chunk in range(0, 90, 3):
        cursor.deliver(chunk, chunk * 7 % 128)
    text = cursor.encode()
    assert Cursor("llmbatch-alice-1", text).bits(3) == 1 << 21
    for broken in [text[:end] for end in range(1, len(text))] + [text + text, text + "AAAA"]:
        with pytest.raises(BadCursor):
            Cursor("llmbatch-alice-1", broken)


@pytest.mark.parametrize("watched", [1, 40_000])
def test_a_cursor_of_ten_million_lines_is_read_back(watched: int) -> None:
    """Watched lines come last in a plan, and their results may come before those of all others."""
    chunks = 10_000_000 // 128
    first = chunks - watched
    cursor = Cursor("llmbatch-alice-1")
    for chunk in range(first, chunks):
        cursor.deliver(chunk, 127)
    text = cursor.encode()
    assert len(text) <= 4096
    again = Cursor("llmbatch-alice-1", text)
    assert [again.bits(chunk) for chunk in (0, first - 1, first, chunks - 1)] == [0, 0, 1 << 127, 1 << 127]


def test_a_small_cursor_that_would_become_huge_is_refused() -> None:
    """It would hold the event loop while it is read."""
    state = internal_pb2.ResultsCursor(bits=[b"\x01"] * 400_000)
    text = cursor_text.encode("llmbatch-alice-1", state)
    assert len(text) <= 4096
    with pytest.raises(BadCursor, match="more chunks than a batch has"):
        Cursor("llmbatch-alice-1", text)
