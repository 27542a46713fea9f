"""The text stays whole when an attempt dies between any two tokens and a reader resumes at any byte.

The test joins the real parts without their processes: the writer of the text, the log as the next attempt reads it, the
gateway's transcript and a reader's cursor.
"""

from collections.abc import Iterator, Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from feed.output import GeneratedOutput
from llm_pb import internal_pb2, llm_pb2
from services.gateway.streams.cursor import Cursor
from services.gpu_worker.engines.engine import Output
from services.gpu_worker.engines.output_text import OutputWriter
from tests.support.examples import examples

END = 0
PROMPT = [int.from_bytes(b"\1p")]
HARD = "👩‍👩‍👧‍👦 e\u0301 漢字 🏳️‍🌈"
"""Text of characters of two to four bytes, combining marks and joined emoji."""


texts = st.text(alphabet="aé漢字🙂👍🏽\u0301\u0308\u200d\ufe0f", min_size=1, max_size=10)


def tokens_of(text: str, sizes: Sequence[int]) -> list[int]:
    """Cut a text into tokens of one to three bytes, wherever characters end. A token's id encodes its bytes."""
    encoded, tokens, start = text.encode(), [], 0
    for size in sizes:
        if start < len(encoded):
            tokens.append(int.from_bytes(b"\1" + encoded[start : start + size]))
            start += size
    return [*tokens, *(int.from_bytes(bytes((1, byte))) for byte in encoded[start:])]


def decode(ids: Sequence[int]) -> str:
    """Return the text of tokens, as a tokenizer does."""
    return b"".join(id_.to_bytes(4).lstrip(b"\0")[1:] for id_ in ids if id_ != END).decode(errors="replace")


def writer(stop: Sequence[str]) -> OutputWriter:
    return OutputWriter(decode, PROMPT, llm_pb2.SamplingParams(max_tokens=500, stop=stop), {END}, 1000)


def written(tokens: Sequence[int], into: OutputWriter) -> Iterator[Output]:
    for token in [*tokens, END]:
        yield (output := into.write([token]))
        if output.finish_reason is not None:
            return


class Log:
    """Log of the outputs that attempts publish, with the records that feed.writer would write."""

    def __init__(self) -> None:
        self.made = GeneratedOutput()

    def publish(self, output: Output) -> None:
        record = internal_pb2.TokensMade(
            offset=len(self.made.text),
            text=output.text,
            token_offset=len(self.made.token_ids),
            token_ids=output.token_ids,
        )
        self.made.add(internal_pb2.FeedRecord(tokens_made=record))
        assert self.made.whole


def read_on(cursor: Cursor, known: bytes, *, final: bool = False) -> bytes:
    """Apply all deltas as llm.proto prescribes for a client, and return the output."""
    while (delta := cursor.take(complete=True, final=final)) is not None:
        assert delta.offset <= len(known)
        assert delta.rewind == (delta.offset < len(known))
        known = known[: delta.offset] + delta.text.encode()
    return known


@examples(200)
@given(text=texts, sizes=st.lists(st.integers(1, 3), max_size=20), stop=st.lists(texts, max_size=1))
@example(text=HARD, sizes=[3] * 20, stop=[])
@example(text=HARD, sizes=[1] * 60, stop=["字 🏳️"])
def test_a_stream_cut_at_every_token_is_whole_from_every_offset(text: str, sizes: list[int], stop: list[str]) -> None:
    """The second attempt continues after the log's last token. A reader with the first N bytes gets the rest once."""
    tokens = tokens_of(text, sizes)
    uninterrupted = "".join(output.text for output in written(tokens, writer(stop)))
    expected = uninterrupted.encode()
    for cut in range(len(tokens) + 2):
        log = Log()
        readers = [(Cursor(log.made.transcript, offset), expected[:offset]) for offset in range(len(expected) + 1)]
        for output, _ in zip(written(tokens, writer(stop)), range(cut), strict=False):
            log.publish(output)
        halfway = [(cursor, read_on(cursor, known)) for cursor, known in readers]

        second = writer(stop)
        last = second.resume(log.made.token_ids, log.made.text.decode())
        if last is not None:
            log.publish(last)
        else:
            for output in written(tokens[second.count :], second):
                log.publish(output)
        log.made.transcript.settle(uninterrupted)

        assert log.made.text == expected
        for cursor, known in halfway:
            assert read_on(cursor, known, final=True) == expected
        for offset in range(len(expected) + 1):
            late = Cursor(log.made.transcript, offset)
            assert read_on(late, expected[:offset], final=True) == expected
