"""A reader's place in a job's output. Offsets count UTF-8 bytes."""

from typing import Final

from feed.transcript import Transcript, character_start
from jobs.resume_token import Digest, ResumeToken
from llm_pb import llm_pb2

MAX_DELTA_BYTES: Final = 256 * 1024
"""A reader that is far behind catches up in deltas of this size: each fits a gRPC message many times over."""


class Cursor:
    """One reader's place.

    A reader comes with a place that it had in an output, which may have been replaced since. The place is found in the
    transcript once that holds all that came before, and so far: until then the reader gets nothing.
    """

    def __init__(self, transcript: Transcript, offset: int, digest: str | None = None) -> None:
        """`digest` is that of the output before `offset` as the reader holds it, where the reader says so."""
        self._transcript = transcript
        self._claimed = None if digest is None else ResumeToken(offset, digest)
        self._digest: Digest | None = Digest() if offset == 0 else None
        self._cuts_seen = len(transcript.cuts) if offset == 0 else 0
        self.offset = offset
        """Where the reader is: all before it was taken, or was known to the reader already."""

    @property
    def behind(self) -> bool:
        """Whether there is more to take."""
        return self._digest is not None and self.offset < len(self._transcript.data)

    @property
    def token(self) -> str:
        """The resume token of the place; empty while it is not found, of a reader that came without one."""
        if self._digest is None:
            return str(self._claimed or "")
        return str(ResumeToken(self.offset, self._digest.hex()))

    def take(self, *, complete: bool, final: bool, most: int = MAX_DELTA_BYTES) -> llm_pb2.OutputDelta | None:
        """Return the next piece of output, of at most so many bytes, and move past it; None when there is none.

        `complete` is whether the transcript holds all output of the job until now, `final` whether no more comes. What
        the reader holds and is not the output is taken back: by rewind in the piece that follows.
        """
        data, cuts = self._transcript.data, self._transcript.cuts
        if self._digest is None:
            if not (final or (complete and self.offset <= len(data))):
                return None
            start = self._agreed()
        else:
            start = min([self.offset, *cuts[self._cuts_seen :]])
        self._cuts_seen = len(cuts)
        start = character_start(data, start)
        rewind = start < self.offset
        if rewind or self._digest is None:
            self._digest = Digest(memoryview(data)[:start])
        end = character_start(data, min(start + most, len(data)))
        self.offset = end
        if start == end and not rewind:
            return None
        piece = data[start:end]
        self._digest.update(piece)
        return llm_pb2.OutputDelta(offset=start, text=piece.decode(), rewind=rewind)

    def _agreed(self) -> int:
        """Return how much of what the reader came with is the output."""
        transcript, size = self._transcript, len(self._transcript.data)
        rewound = transcript.rewinds > 0 and transcript.lowest_rewind < self.offset
        if self._claimed is not None:
            if self.offset <= size and Digest(memoryview(transcript.data)[: self.offset]).hex() == self._claimed.digest:
                return self.offset
            # Parted by a rewind that is known, or by one that nobody has recorded.
            return min(transcript.lowest_rewind, size) if rewound else 0
        return min(self.offset, transcript.lowest_rewind if rewound else size, size)
