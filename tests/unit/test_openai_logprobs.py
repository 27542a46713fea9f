"""The places of tokens in the output of an engine that is another server."""

from typing import Any, Final

from openai.types.chat import ChatCompletionChunk

from services.gpu_worker.engines.openai import _Pieces

EMOJI: Final = [*"🙂".encode()]


def chunk(text: str, *tokens: tuple[str, list[int] | None]) -> ChatCompletionChunk:
    content: list[dict[str, Any]] = [
        {"token": token, "bytes": of_token, "logprob": -1.0, "top_logprobs": []} for token, of_token in tokens
    ]
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, "logprobs": {"content": content}}
    return ChatCompletionChunk.model_validate(
        {"id": "1", "created": 0, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}
    )


def offsets(*chunks: ChatCompletionChunk) -> list[int]:
    pieces = _Pieces(100, 100, logprobs=True)
    made = [output for output in map(pieces.add, chunks) if output is not None]
    return [place.offset for output in made for place in output.logprobs]


def test_parts_of_a_character_begin_where_their_bytes_do() -> None:
    parts = [("\ufffd", EMOJI[:1]), ("\ufffd", EMOJI[1:2]), ("\ufffd", EMOJI[2:])]
    assert offsets(chunk("a🙂b", ("a", [97]), *parts, ("b", [98])), chunk("c", ("c", [99]))) == [0, 1, 2, 3, 5, 6]


def test_no_place_is_behind_the_text_of_its_chunk() -> None:
    """A server need not tell bytes, joins chunks on a busy machine, and shows tokens that are no text."""
    parts = [("\ufffd", None)] * 3
    assert offsets(chunk("a🙂b", ("a", None), *parts, ("b", None)), chunk("c", ("c", None))) == [0, 1, 4, 6, 6, 6]
    assert offsets(chunk("", ("<|end|>", None)), chunk("c", ("c", None))) == [0, 0]
