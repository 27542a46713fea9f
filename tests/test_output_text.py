"""Text comes out whole, in the same pieces, whatever the tokens cut."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_pb import llm_pb2
from services.gpu_worker.engine import CannotContinue, Output
from services.gpu_worker.output_text import LENGTH, STOP, Detokenizer, OutputWriter, StopTexts

END = 256


def decode(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes: it cuts every character that can be cut."""
    return bytes(token for token in ids if token != END).decode(errors="replace")


def writer(max_tokens: int = 1000, context: int = 5000, **changes: object) -> OutputWriter:
    params = llm_pb2.SamplingParams(max_tokens=max_tokens, **changes)  # type: ignore[arg-type]
    return OutputWriter(decode, list(b"prompt"), params, {END}, context)


def write_all(into: OutputWriter, tokens: Sequence[int]) -> list[Output]:
    made = []
    for token in tokens:
        made.append(into.write([token]))
        if made[-1].finish_reason is not None:
            break
    return made


def text_of(made: list[Output]) -> str:
    return "".join(output.text for output in made)


@given(st.text())
def test_any_text_comes_out_as_it_went_in_and_never_a_part_of_a_character(text: str) -> None:
    detokenizer = Detokenizer(decode, list(b"prompt"))
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    # A U+FFFD at the very end cannot be told from a character that is not finished.
    assert "".join(pieces) == text.rstrip("\ufffd") or "".join(pieces) == text
    assert all(piece in text for piece in pieces)


def test_bytes_that_are_no_text_do_not_hold_back_what_follows() -> None:
    detokenizer = Detokenizer(decode, [])
    pieces = [detokenizer.push(byte) for byte in b"\xff\xff\xff\xff\xff then text"]
    assert "".join(pieces).endswith(" then text")


def test_a_space_that_the_tokenizer_drops_at_the_start_is_kept_after_the_prompt() -> None:
    detokenizer = Detokenizer(lambda ids: decode(ids).removeprefix(" "), list(b"prompt"))
    assert "".join(detokenizer.push(byte) for byte in b" word") == " word"


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_the_stop_text_that_ends_first_ends_the_output_however_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    finder, output, rest = StopTexts(stops), "", text
    while rest and not finder.met:
        size = data.draw(st.integers(1, 5))
        output += finder.push(rest[:size], may_stop=True)
        rest = rest[size:]
    assert output + finder.rest() == expected
    assert finder.met == bool(ends)


def test_text_is_held_back_only_while_it_may_become_a_stop_text() -> None:
    finder = StopTexts(["<stop>", "\n\n"])
    assert [finder.push(text, may_stop=True) for text in ("a <st", "one", "\n", "b", "<")] == [
        "a ",
        "<stone",
        "",
        "\nb",
        "",
    ]
    assert finder.rest() == "<"


def test_a_stop_text_within_min_tokens_is_output() -> None:
    made = write_all(writer(stop=["bc"], min_tokens=4), b"abcdabcd")
    assert text_of(made) == "abcda"
    assert made[-1].finish_reason == STOP


def test_the_end_token_counts_and_gives_no_text() -> None:
    made = write_all(writer(), [*b"ab", END, *b"cd"])
    assert text_of(made) == "ab"
    assert made[-1] == Output("", (END,), 6, STOP)


@pytest.mark.parametrize(("max_tokens", "context"), [(3, 5000), (1000, 9)])
def test_max_tokens_and_the_context_end_the_output_with_what_was_held_back(max_tokens: int, context: int) -> None:
    made = write_all(writer(max_tokens, context, stop=["bcd"]), b"abcdef")
    assert text_of(made) == "abc"
    assert made[-1].finish_reason == LENGTH


def test_tokens_after_the_end_are_dropped() -> None:
    logprobs = [llm_pb2.TokenLogprobs() for _ in range(5)]
    output = writer(stop=["c"]).write(list(b"abcde"), logprobs)
    assert (output.text, output.token_ids, len(output.logprobs)) == ("ab", tuple(b"abc"), 3)


def test_an_unfinished_character_at_the_end_is_no_output() -> None:
    assert text_of(write_all(writer(max_tokens=3), "a🙂".encode())) == "a"


@given(st.text(min_size=1, max_size=20), st.sampled_from([[], ["bc"], ["🙂b", "é"]]), st.integers(0, 8))
def test_cut_anywhere_the_rest_is_what_it_would_have_been(text: str, stops: list[str], min_tokens: int) -> None:
    tokens = [*("a🙂bc" + text + "é").encode(), END]
    whole = write_all(writer(stop=stops, min_tokens=min_tokens), tokens)
    for cut in range(len(whole) + 1):
        resumed = writer(stop=stops, min_tokens=min_tokens)
        ended = resumed.resume(tokens[:cut], text_of(whole[:cut]))
        assert (ended is not None) == (cut == len(whole))
        rest = [ended] if ended else write_all(resumed, tokens[cut:])
        assert text_of(whole[:cut]) + text_of(rest) == text_of(whole)
        assert rest[-1].finish_reason == whole[-1].finish_reason


def test_tokens_that_do_not_give_the_published_text_cannot_be_continued() -> None:
    for tokens, published in ((b"abc", "abX"), (b"abc", "ab"), (b"abc", "abcd"), ([*b"ab", END, *b"c"], "abc")):
        with pytest.raises(CannotContinue):
            writer().resume(tuple(tokens), published)
