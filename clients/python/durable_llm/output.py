"""The output of a job, assembled from its pieces."""

from typing import TYPE_CHECKING

from llm_pb import llm_pb2

if TYPE_CHECKING:
    # That module imports this one.
    from durable_llm._job import Piece


class Output:
    """The output that a reader holds. It applies each rewind."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        """Return the size in bytes: the offset at which the next piece begins."""
        return len(self._data)

    def add(self, piece: "Piece | llm_pb2.OutputDelta") -> None:
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
