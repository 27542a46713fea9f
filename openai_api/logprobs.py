"""Log probabilities in the forms of OpenAI's endpoints."""

from collections.abc import Iterable, Sequence
from typing import Any

from llm_pb import llm_pb2


def logprobs_of(tokens: Iterable[llm_pb2.TokenLogprobs]) -> list[dict[str, Any]]:
    """Return the log probabilities of tokens, as responses and chat completions hold them."""
    return [{**_token(token.chosen), "top_logprobs": [_token(top) for top in token.top]} for token in tokens]


def legacy_logprobs(tokens: Sequence[llm_pb2.TokenLogprobs]) -> dict[str, Any]:
    """Return the log probabilities of tokens, as completions hold them. An offset counts the characters before it."""
    offsets, end = [], 0
    for token in tokens:
        offsets.append(end)
        end += len(token.chosen.token)
    return {
        "tokens": [token.chosen.token for token in tokens],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "top_logprobs": [{top.token: top.logprob for top in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _token(token: llm_pb2.TokenLogprob) -> dict[str, Any]:
    # The bytes of a token that begins or ends within a character are not known.
    known = "\ufffd" not in token.token
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.token.encode()) if known else []}
