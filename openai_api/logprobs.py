"""Log probabilities in the forms of OpenAI's endpoints."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from llm_pb import llm_pb2

_LEAST: Final = -9999.0


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
        "token_logprobs": [_number(token.chosen) for token in tokens],
        "top_logprobs": [{top.token: _number(top) for top in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _number(token: llm_pb2.TokenLogprob) -> float:
    """Return the log probability of a token. That of one that cannot be chosen, -inf, is no number of JSON."""
    return token.logprob if token.logprob > _LEAST else _LEAST


def _token(token: llm_pb2.TokenLogprob) -> dict[str, Any]:
    # The bytes of a token that begins or ends within a character are not known.
    known = "\ufffd" not in token.token
    return {"token": token.token, "logprob": _number(token), "bytes": list(token.token.encode()) if known else []}
