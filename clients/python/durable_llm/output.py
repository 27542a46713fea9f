"""The output of a job, put together from its pieces."""

from durable_llm._job import Piece
from llm_pb import llm_pb2


class Output:
    """All output that a reader holds; rewinds are done as they come."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        """Return the size in bytes: the offset at which the next piece begins."""
        return len(self._data)

    def add(self, piece: Piece | llm_pb2.OutputDelta) -> None:
        """Put a piece, or the delta of a message of `watch`, in its place.

        Raises ValueError for one that leaves a gap: it is another stream's.
        """
        if piece.offset > len(self._data):
            raise ValueError(f"the piece begins at byte {piece.offset}, the output ends at {len(self._data)}")
        del self._data[piece.offset :]
        self._data += piece.text.encode()

    @property
    def text(self) -> str:
        """The output so far."""
        return self._data.decode()
