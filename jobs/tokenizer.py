"""Checks of a prompt against a model's tokenizer before the prompt is tokenised, the same for gateway and worker.

Tokenising 2 MB takes about a second. It takes a fraction of that to check whether a text is far too long for a model,
and whether a chat message holds a special token.
"""

import json
from collections.abc import Iterable
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

_KEEPS_ALL: Final = ("ByteLevel", "Digits", "Split")
"""Pre-tokenizers that drop no text, provided that the behavior of a Split is not Removed."""

WHY_NOT_SPECIAL: Final = "it is a special token of this model, with which a message could pass for other turns"
"""Reason to give after the name of a special token that a message holds."""


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Return the maximum number of bytes of text that a token can stand for; None if there is no such bound.

    The bound exists for byte-level BPE over all 256 bytes, provided that nothing drops text: no normalizer, no
    pre-tokenizer that removes the separators of its split, no added token that absorbs the spaces around it.
    """
    description = json.loads(tokenizer.to_str())
    model, added = description["model"], description["added_tokens"]
    pre_tokenizer = description["pre_tokenizer"] or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = (
        model["type"] == "BPE"
        and description["normalizer"] is None
        and any(step.get("type") == "ByteLevel" for step in steps)
        and all(step.get("type") in _KEEPS_ALL and step.get("behavior") != "Removed" for step in steps)
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not any(token["lstrip"] or token["rstrip"] for token in added)
        and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    )
    if not byte_level:
        return None
    # In the vocabulary each character stands for a byte.
    return max(*map(len, model["vocab"]), *(len(token["content"].encode()) for token in added), 1)


class SpecialTokens:
    """Finds a tokenizer's special tokens in a text by the tokenizer's own rules, at about 20 MB a second."""

    def __init__(self, tokens: Iterable[AddedToken | str], normalizer: Any = None) -> None:
        """`normalizer` is the tokenizer's, for tokens that are searched in normalized text."""
        # This tokenizer knows only the special tokens: the text between two of them is one unknown word.
        self._finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        if normalizer is not None:
            self._finder.normalizer = normalizer
        self._finder.add_special_tokens(list(tokens))

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """Return the special tokens of a tokenizer."""
        tokens = [token for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        return cls(tokens, tokenizer.normalizer)

    def first_in(self, text: str) -> str | None:
        """Return the first special token in the text, or None. Call it in a thread for a text of 100 kB or more."""
        # Only the batch methods release the GIL.
        (found,) = self._finder.encode_batch_fast([text], add_special_tokens=False)
        token = next((id_ for id_ in found.ids if id_), None)
        return None if token is None else self._finder.id_to_token(token)
