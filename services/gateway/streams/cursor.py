"""A reader's place in a job's output. Offsets count UTF-8 bytes."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from feed.transcript import Transcript, character_start, offset_of
from jobs.resume_token import Digest, ResumeToken
from llm_pb import llm_pb2

MAX_DELTA_BYTES: Final = 256 * 1024
"""Maximum size of a delta. A reader that is far behind catches up in several. gRPC's message limit is far higher."""


class Cursor:
    """One reader's place.

    A reader gets nothing until the transcript is complete: the end of the log may replace what its beginning says.

    A reader resumes from a place in an output that may have been replaced since. The place is looked up once the
    transcript reaches it.
    """

    def __init__(self, transcript: Transcript, offset: int, digest: str | None = None) -> None:
        """`digest` is that of the output before `offset` as the reader holds it; None when the reader gave none."""
        self._transcript = transcript
        self._claimed = None if digest is None else ResumeToken(offset, digest)
        self._digest: Digest | None = Digest() if offset == 0 else None
        self._cuts_seen = len(transcript.cuts) if offset == 0 else 0
        self.offset = offset
        """Number of bytes that the reader has, taken here or held before."""

    @property
    def behind(self) -> bool:
        """Whether there is more output for the reader."""
        return self._digest is not None and self.offset < len(self._transcript.data)

    @property
    def place(self) -> ResumeToken:
        """The place, with an empty digest where the reader's output is not known to be the job's and it claims none."""
        if self._digest is not None:
            return ResumeToken(self.offset, self._digest.hex())
        return self._claimed or ResumeToken(self.offset, "")

    @property
    def token(self) -> str:
        """The resume token of the place. Until the place is found it is the reader's own token, empty without one."""
        if self._digest is None:
            return str(self._claimed or "")
        return str(ResumeToken(self.offset, self._digest.hex()))

    def take(self, *, complete: bool, final: bool, most: int = MAX_DELTA_BYTES) -> llm_pb2.OutputDelta | None:
        """Return the next piece of output, of at most `most` bytes, and move past it; None when there is none.

        Text has at most `most` bytes, and the log probabilities of its tokens have, beyond those of the first.

        `complete` is whether the transcript holds all output of the job until now, `final` whether it will get no more.
        Bytes that the reader holds and that are not the output are taken back: the next piece has `rewind` set.
        """
        data, cuts = self._transcript.data, self._transcript.cuts
        if not (final or complete):
            return None
        if self._digest is None:
            if not final and self.offset > len(data):
                return None
            start = self._agreed()
        else:
            start = self.offset if len(cuts) == self._cuts_seen else min(self.offset, *cuts[self._cuts_seen :])
        self._cuts_seen = len(cuts)
        start = character_start(data, start)
        rewind = start < self.offset
        if rewind or self._digest is None:
            self._digest = Digest(memoryview(data)[:start])
        end = character_start(data, min(start + most, len(data)))
        logprobs: Sequence[llm_pb2.TokenLogprobs] = ()
        if self._transcript.logprobs:
            logprobs, end = logprobs_between(self._transcript.logprobs, start, end, most)
        self.offset = end
        if start == end and not rewind:
            return None
        piece = data[start:end]
        self._digest.update(piece)
        return llm_pb2.OutputDelta(offset=start, text=piece.decode(), rewind=rewind, logprobs=logprobs)

    def rest(self) -> Sequence[llm_pb2.TokenLogprobs]:
        """Return the log probabilities of the tokens after all text. Call it after take() has returned all of it."""
        return logprobs_after(self._transcript.logprobs, self.offset)

    def _agreed(self) -> int:
        """Return the number of bytes at which the reader's output and the job's agree."""
        transcript, size = self._transcript, len(self._transcript.data)
        rewound = transcript.rewinds > 0 and transcript.lowest_rewind < self.offset
        if self._claimed is not None:
            if self.offset <= size and Digest(memoryview(transcript.data)[: self.offset]).hex() == self._claimed.digest:
                return self.offset
            # The two differ since a recorded rewind, or since one that was not recorded.
            return min(transcript.lowest_rewind, size) if rewound else 0
        return min(self.offset, transcript.lowest_rewind if rewound else size, size)


def logprobs_after(places: Sequence[llm_pb2.TokenLogprobs], offset: int) -> Sequence[llm_pb2.TokenLogprobs]:
    """Return the log probabilities of the tokens from an offset on."""
    return places[bisect_left(places, offset, key=offset_of) :]


def logprobs_between(
    places: Sequence[llm_pb2.TokenLogprobs], start: int, end: int, most: int
) -> tuple[Sequence[llm_pb2.TokenLogprobs], int]:
    """Return the log probabilities of the tokens from `start` on, and where they end: at `end` if they all fit.

    Tokens without text of their own are at the same offset as the next one that has text, and stay with it.
    """
    first = last = bisect_left(places, start, key=offset_of)
    size = 0
    while last < len(places) and places[last].offset < end:
        size += places[last].ByteSize()
        if size > most and places[last].offset > start:
            end = places[last].offset
            break
        last += 1
    return places[first : bisect_left(places, end, first, last, key=offset_of)], end
