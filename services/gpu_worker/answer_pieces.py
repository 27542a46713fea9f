"""Answers as the cache keeps them: in pieces that the engine has cut, so that any attempt can continue between two."""

from collections.abc import Sequence
from typing import Final

from feed.output import GeneratedOutput
from llm_pb import internal_pb2
from services.gpu_worker.engines.engine import Output

_PIECE_BYTES: Final = 1024
"""Size that makes a piece whole."""


def add_output(pieces: list[internal_pb2.CachedPiece], output: Output) -> None:
    """Add what the engine has generated to the pieces of an answer."""
    if not (output.text or output.token_ids):
        return
    if not pieces or len(pieces[-1].text) + len(pieces[-1].token_ids) >= _PIECE_BYTES:
        pieces.append(internal_pb2.CachedPiece())
    pieces[-1].text += output.text
    pieces[-1].token_ids.extend(output.token_ids)
    pieces[-1].logprobs.extend(output.logprobs)


def rest_of(answer: internal_pb2.CachedAnswer, held: GeneratedOutput) -> Sequence[internal_pb2.CachedPiece] | None:
    """Return the pieces of an answer after what is held of it, at least one; None if that is no part of it."""
    ids = [token for piece in answer.pieces for token in piece.token_ids]
    text = "".join(piece.text for piece in answer.pieces).encode()
    count, size = len(held.token_ids), len(held.text)
    if ids[:count] != held.token_ids or text[:size] != held.text:
        return None
    rest = []
    for piece in answer.pieces:
        left, more = max(count, 0), max(size, 0)
        count, size = count - len(piece.token_ids), size - len(piece.text.encode())
        if left < len(piece.token_ids) or more < len(piece.text.encode()):
            part = internal_pb2.CachedPiece(
                text=piece.text.encode()[more:].decode(),
                token_ids=piece.token_ids[left:],
                logprobs=piece.logprobs[left:],
            )
            rest.append(part)
    return rest or [internal_pb2.CachedPiece()]
