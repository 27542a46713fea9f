"""The cursor of StreamBatchResults."""

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

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


def test_a_cursor_of_an_earlier_run_of_the_batch_is_as_an_empty_one() -> None:
    """The items of the run before were missing in what its reader got of the next one."""
    first, second = Timestamp(seconds=1), Timestamp(seconds=2)
    cursor = Cursor("llmbatch-alice-1")
    assert not cursor.is_of_another_run(first)
    cursor.deliver(0, 1)
    cursor.rest = 3
    again = Cursor("llmbatch-alice-1", cursor.encode())
    assert not again.is_of_another_run(first)
    assert (again.bits(0), again.rest) == (2, 3)
    assert again.is_of_another_run(second)
    assert (again.bits(0), again.rest) == (0, 0)
    assert not again.is_of_another_run(second)


def test_a_cursor_of_an_earlier_version_goes_on() -> None:
    cursor = Cursor("llmbatch-alice-1")
    cursor.deliver(0, 1)
    again = Cursor("llmbatch-alice-1", cursor.encode())
    assert not again.is_of_another_run(Timestamp(seconds=1))
    assert again.bits(0) == 2
