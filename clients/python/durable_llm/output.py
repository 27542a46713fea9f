"""The output of a job, assembled from its pieces."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm_pb import llm_pb2


@dataclass(frozen=True)
class Piece:
    """A piece of a job's output."""

    text: str
    """The text, in whole characters."""
    offset: int
    """Where the text begins in the output, in UTF-8 bytes."""
    rewind: bool
    """Whether the job had to start over from the offset: drop the output from there on, then add the text."""
    resume_token: str
    """The token with which AsyncJob.stream continues after this piece. Empty from a gateway of an earlier version."""
    logprobs: Sequence[llm_pb2.TokenLogprobs] = ()
    """The log probabilities of the piece's tokens, if the job asks for them: see OutputDelta in llm.proto.

    The last piece may have no text, only those of the tokens after all text.
    """


class Output:
    """The output that a reader holds. It applies each rewind."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        """Return the size in bytes: the offset at which the next piece begins."""
        return len(self._data)

    def add(self, piece: Piece | llm_pb2.OutputDelta) -> None:
        """Add a piece of `stream`, or the delta of a message of `watch`.

        Raises ValueError for a piece that leaves a gap: it does not belong to this output.
        """
        if piece.offset > len(self._data):
            raise ValueError(f"the piece begins at byte {piece.offset}, the output ends at {len(self._data)}")
        del self._data[piece.offset :]
        self._data += piece.text.encode()

    @property
    def text(self) -> str:
        """The output so far."""
        return self._data.decode()
