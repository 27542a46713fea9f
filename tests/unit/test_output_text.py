"""Output text is whole and comes in the same pieces, wherever tokens cut characters and stop texts."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders

from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import CannotContinue, Output
from services.gpu_worker.engines.output_text import LENGTH, STOP, Detokenizer, OutputWriter, StopTexts

END = 256


def decode(ids: Sequence[int]) -> str:
    """Decode tokens that are single bytes, so that every character of several bytes is cut."""
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
    # A U+FFFD at the end cannot be distinguished from an incomplete character.
    assert "".join(pieces) == text.rstrip("\ufffd") or "".join(pieces) == text
    assert all(piece in text for piece in pieces)


SCRIPTS = "नमस्तेहिन्दी\u200d\u094d👩\u200d🚀🏳️\u200d🌈👍🏽漢字仮名한글éß\u0301 a."
"""Characters of one to four bytes: Devanagari, emoji with joiners and modifiers, CJK, combining marks, ASCII."""


def pieces_of(text: str, sizes: Sequence[int]) -> list[bytes]:
    """Cut a text into tokens of these sizes in bytes, wherever characters end, and the rest into single bytes."""
    data, pieces = text.encode(), []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [piece for piece in [*pieces, *(bytes((byte,)) for byte in data)] if piece]


@given(st.text(SCRIPTS, max_size=60), st.lists(st.integers(1, 7), max_size=80))
@example("नमस्ते" * 40, [4, *[3] * 300])
@example("漢字" * 60, [1, *[3] * 300])
@example("🙂" * 60, [2, *[4] * 300])
def test_tokens_that_hold_parts_of_two_characters_come_out_as_all_of_them_decoded(text: str, sizes: list[int]) -> None:
    pieces = pieces_of(text, sizes)
    seen: list[int] = []

    def decode_pieces(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return b"".join(pieces[id_] for id_ in ids).decode(errors="replace")

    detokenizer = Detokenizer(decode_pieces, [])
    assert "".join(map(detokenizer.push, range(len(pieces)))) == text
    # The cost of a token stays bounded, however long no token ends at the end of a character.
    assert max(seen, default=0) <= 40


@given(st.text(SCRIPTS, max_size=40), st.sets(st.sampled_from(SCRIPTS)))
def test_characters_that_fall_back_to_a_token_for_each_byte_come_out_whole(text: str, known: set[str]) -> None:
    """A real decoder with byte fallback shows each of these tokens as U+FFFD until the last one completes them."""
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokens = [
        token
        for character in text
        for token in ([character] if character in known else [f"<0x{byte:02X}>" for byte in character.encode()])
    ]
    detokenizer = Detokenizer(lambda ids: decoder.decode([tokens[id_] for id_ in ids]), [])
    assert "".join(map(detokenizer.push, range(len(tokens)))) == text


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=60))
def test_bytes_that_are_no_text_come_out_as_all_of_them_decoded_but_for_the_end(pieces: list[bytes]) -> None:
    detokenizer = Detokenizer(lambda ids: b"".join(pieces[id_] for id_ in ids).decode(errors="replace"), [])
    output = "".join(map(detokenizer.push, range(len(pieces))))
    whole = b"".join(pieces).decode(errors="replace")
    assert whole.startswith(output)
    assert not whole[len(output) :].strip("\ufffd")
    # The output holds back at most three bytes of an incomplete character and the text of three more tokens.
    assert len(whole) - len(output) <= 3 + 3 * 5


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
