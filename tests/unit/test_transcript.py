"""A watcher's text is correct from every offset, for every sequence of attempts and pieces."""

from hypothesis import given
from hypothesis import strategies as st

from feed.transcript import Transcript
from llm_pb import llm_pb2
from services.gateway.streams.cursor import MAX_DELTA_BYTES, Cursor

texts = st.lists(st.text(alphabet="ab é漢🙂\u0301\u200d", max_size=6), max_size=8)


def apply(known: bytes, delta: llm_pb2.OutputDelta | None) -> bytes:
    """Apply a delta as llm.proto prescribes for a client, and return the output."""
    if delta is None:
        return known
    assert delta.offset <= len(known)
    assert delta.rewind == (delta.offset < len(known))
    return known[: delta.offset] + delta.text.encode()


def drain(cursor: Cursor, known: bytes, *, final: bool = False) -> bytes:
    while (delta := cursor.take(complete=True, final=final)) is not None:
        known = apply(known, delta)
    return known


@given(first=texts, second=texts, look_after=st.integers(0, 16))
def test_an_attempt_that_starts_over_ends_with_its_own_text(
    first: list[str], second: list[str], look_after: int
) -> None:
    """A watcher that reads at any moment finally holds the second attempt's text."""
    transcript = Transcript()
    cursor, known, steps = Cursor(transcript, 0), b"", 0
    for attempt in (first, second):
        offset = 0
        for text in attempt:
            transcript.put(offset, text)
            offset += len(text.encode())
            steps += 1
            if steps >= look_after:
                known = drain(cursor, known)
    transcript.settle("".join(second))
    assert drain(cursor, known, final=True) == "".join(second).encode()


@given(texts)
def test_the_same_text_again_rewinds_nobody(text: list[str]) -> None:
    """A greedy model generates the same text again after a restart. No watcher is notified of it."""
    transcript = Transcript()
    cursor = Cursor(transcript, 0)
    for _ in range(2):
        offset = 0
        for piece in text:
            transcript.put(offset, piece)
            offset += len(piece.encode())
    delta = cursor.take(complete=True, final=False)
    assert (delta.text if delta else "") == "".join(text)
    assert cursor.take(complete=True, final=False) is None


@given(text=st.text(alphabet="aé漢🙂\u0301", max_size=12), data=st.data())
def test_any_offset_is_continued_from(text: str, data: st.DataObject) -> None:
    """A client that has the first N bytes, even of a cut character, gets the whole output."""
    encoded = text.encode()
    offset = data.draw(st.integers(0, len(encoded) + 3))
    transcript = Transcript()
    transcript.put(0, text)
    known = (encoded + b"???")[:offset]
    assert drain(Cursor(transcript, offset), known, final=True) == encoded


def test_a_new_reader_gets_nothing_that_the_rest_of_the_log_replaces() -> None:
    """A gateway reads the log of a job from its beginning, and what an earlier attempt made stands there first."""
    transcript = Transcript()
    cursor = Cursor(transcript, 0)
    transcript.put(0, "over the hills")
    assert cursor.take(complete=False, final=False) is None
    transcript.put(0, "the cat")
    assert cursor.take(complete=True, final=False) == llm_pb2.OutputDelta(text="the cat")


def test_a_gap_is_refused() -> None:
    transcript = Transcript()
    transcript.put(0, "ab")
    transcript.put(3, "d")
    assert drain(Cursor(transcript, 0), b"") == b"ab"
    transcript.put(2, "cd")
    assert drain(Cursor(transcript, 0), b"") == b"abcd"


def test_a_reader_far_behind_catches_up_in_pieces() -> None:
    text = "漢" * MAX_DELTA_BYTES
    transcript = Transcript()
    transcript.put(0, text)
    cursor, known, pieces = Cursor(transcript, 0), b"", 0
    while (delta := cursor.take(complete=True, final=False)) is not None:
        assert len(delta.text.encode()) <= MAX_DELTA_BYTES
        known = apply(known, delta)
        pieces += 1
    assert known == text.encode()
    assert pieces == 4
