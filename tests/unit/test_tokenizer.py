"""Facts known without tokenising: the maximum length of a token, and the special tokens in a text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from jobs.tokenizer import SpecialTokens, longest_token
from tests.support.paths import ROOT

DOCSTRINGS = Tokenizer.from_file(str(ROOT / "models" / "docstrings" / "tokenizer.json"))
BYTES = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level() -> Tokenizer:
    """Return a byte-level tokenizer, which has the bound, with one token of two bytes."""
    tokenizer = Tokenizer(models.BPE({**BYTES, "ab": 256}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@given(st.text() | st.text("<|end>system") | st.text(" \n"))
def test_no_text_has_fewer_tokens_than_the_bound_says(text: str) -> None:
    tokenizer = DOCSTRINGS
    longest = longest_token(tokenizer)
    assert longest is not None
    assert len(tokenizer.encode(text, add_special_tokens=False)) * longest >= len(text.encode())


def test_an_added_token_may_be_the_longest() -> None:
    tokenizer = byte_level()
    assert longest_token(tokenizer) == 2
    tokenizer.add_tokens(["ééé"])
    assert longest_token(tokenizer) == 6


def test_steps_that_keep_all_text_keep_the_bound() -> None:
    """Most of today's tokenizers first split the text by a pattern."""
    tokenizer = byte_level()
    split = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    assert longest_token(tokenizer) == 2


def with_normalizer() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def that_removes_spaces() -> Tokenizer:
    tokenizer = byte_level()
    split = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel()])
    return tokenizer


def with_a_greedy_token() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<end>", rstrip=True)])
    return tokenizer


def without_a_byte() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({byte: index for byte, index in BYTES.items() if byte != "x"}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


def of_words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))


@pytest.mark.parametrize("make", [with_normalizer, that_removes_spaces, with_a_greedy_token, without_a_byte, of_words])
def test_where_a_token_can_stand_for_any_length_there_is_no_bound(make: "type[Tokenizer]") -> None:
    """Each of these tokenizers can encode a thousand characters as one token or none."""
    tokenizer = make()
    assert longest_token(tokenizer) is None
    texts = ("\u0958" * 9, " " * 1000, "<end>" + " " * 1000, "x" * 1000, "y" * 1000)
    assert any(len(tokenizer.encode(text)) * 2 < len(text.encode()) for text in texts) or make is with_normalizer


def test_special_tokens_are_found_as_the_tokenizer_finds_them() -> None:
    special = SpecialTokens.of(DOCSTRINGS)
    assert special.first_in("a <|user|><|end|>") == "<|user|>"
    assert special.first_in("") is None
    for text in ("<|user>", "< |user|>", "<|USER|>", "user", "<|unknown|>", "é" * 1000):
        assert special.first_in(text) is None
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens([AddedToken("<word>", single_word=True)])
    special = SpecialTokens.of(tokenizer)
    assert special.first_in("a <word>") == "<word>"
    assert special.first_in("a<word>b <tool>") is None


@given(st.lists(st.sampled_from(["<|", "|>", "end", "user", "<|end|>", " ", "é", "<|user|>"])).map("".join))
def test_a_text_without_a_special_token_has_none_among_its_tokens(text: str) -> None:
    tokenizer = DOCSTRINGS
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found = SpecialTokens.of(tokenizer).first_in(text)
    assert (found is None) == special.isdisjoint(tokenizer.encode(text, add_special_tokens=False).ids)
