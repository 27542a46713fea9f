"""The output of a job that is a file, read from the store by ranges, and a reader's place in it.

It replaces the transcript where this gateway does not hold the whole output: the job had ended before anybody here
watched it, or a part of its feed was lost. Nothing of it stays in memory beyond the message that is sent next.
"""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Final

from feed.transcript import character_start
from jobs.resume_token import Digest, ResumeToken
from llm_pb import llm_pb2
from services.gateway.errors import files_disabled
from services.gateway.files.failures import store_errors
from services.gateway.streams.cursor import Cursor, logprobs_after, logprobs_between
from store.outputs import stored_output
from store.store import MAX_PIECE_BYTES, Store, StoredObject

_READ_BYTES: Final = 64 * 1024
"""Minimum size of a range, in bytes: a reader that may only get small messages must not cause a request for each."""
_CHARACTER_BYTES: Final = 4
"""Maximum size of a character in UTF-8."""


class StoredOutput:
    """The output of one job. Watchers share it."""

    def __init__(self, store: Store | None, job_id: str, result: llm_pb2.JobResult) -> None:
        """`result` has an output_file."""
        self.result = result
        self.size: Final = result.output_file.size_bytes
        self._file = result.output_file
        self._store = store
        self._job_id = job_id
        self._object: StoredObject | None = None

    async def read(self, start: int, end: int) -> bytes:
        """Return the bytes of the output from `start` up to `end`, exclusive.

        Raises ApiError: UNAVAILABLE while the store is away, DATA_LOSS for content that is gone, FAILED_PRECONDITION
        where this gateway has no store.
        """
        if self._store is None:
            raise files_disabled()
        with store_errors(self._file.file_id):
            if self._object is None:
                self._object = await stored_output(self._store, self._job_id, self._file)
            async with aclosing(self._store.read(self._object, start, end)) as pieces:
                return b"".join([piece async for piece in pieces])

    async def digest(self, end: int, digest: Digest | None = None, start: int = 0) -> Digest:
        """Return the digest of the output up to `end`. `digest` is that of the output up to `start`. Raises as read."""
        digest = Digest() if digest is None else digest.copy()
        for at in range(start, end, MAX_PIECE_BYTES):
            digest.update(await self.read(at, min(at + MAX_PIECE_BYTES, end)))
        return digest

    async def character_start(self, offset: int) -> int:
        """Return the offset at which the character around an offset begins. Raises as read."""
        begin = max(offset - _CHARACTER_BYTES, 0)
        if offset in (0, self.size):
            return offset
        return begin + character_start(bytearray(await self.read(begin, offset + 1)), offset - begin)


class StoredCursor:
    """One reader's place in a stored output. It continues where a Cursor is."""

    def __init__(self, output: StoredOutput, earlier: Cursor) -> None:
        self._output = output
        self._claimed = earlier.place
        self._digest: Digest | None = None
        self._read = b""
        self.offset = self._claimed.offset
        """Number of bytes that the reader has."""

    @property
    def behind(self) -> bool:
        """Whether there is more output for the reader, or may be."""
        return self._digest is None or self.offset < self._output.size

    @property
    def token(self) -> str:
        """See Cursor."""
        if self._digest is None:
            return str(self._claimed) if self._claimed.digest else ""
        return str(ResumeToken(self.offset, self._digest.hex()))

    async def take(self, most: int) -> llm_pb2.OutputDelta | None:
        """Return the next piece of output as Cursor.take() does, and move past it; None when there is none.

        Raises as StoredOutput.read.
        """
        rewind = False
        if self._digest is None:
            start, self._digest = await self._agreed()
            rewind, self.offset = start < self.offset, start
        start = self.offset
        size = min(most, self._output.size - start)
        # One more byte tells whether the character before it is whole.
        if len(self._read) <= size:
            until = min(start + max(size + 1, _READ_BYTES), self._output.size)
            self._read += await self._output.read(start + len(self._read), until)
        end = start + character_start(bytearray(self._read[: size + 1]), size)
        logprobs: Sequence[llm_pb2.TokenLogprobs] = ()
        if self._output.result.logprobs:
            logprobs, end = logprobs_between(self._output.result.logprobs, start, end, most)
        if start == end and not rewind:
            return None
        piece, self._read, self.offset = self._read[: end - start], self._read[end - start :], end
        self._digest.update(piece)
        return llm_pb2.OutputDelta(offset=start, text=piece.decode(), rewind=rewind, logprobs=logprobs)

    def rest(self) -> Sequence[llm_pb2.TokenLogprobs]:
        """See Cursor."""
        return logprobs_after(self._output.result.logprobs, self.offset)

    async def _agreed(self) -> tuple[int, Digest]:
        """Return the number of bytes at which the reader's output and the job's agree, and their digest."""
        output, claimed, metadata = self._output, self._claimed, self._output.result.metadata
        rewound = metadata.rewinds > 0 and metadata.lowest_rewind_offset < claimed.offset
        lowest = metadata.lowest_rewind_offset if rewound else output.size
        if not claimed.digest:
            start = await output.character_start(min(claimed.offset, lowest, output.size))
            return start, await output.digest(start)
        common = await output.character_start(min(lowest, output.size)) if rewound else 0
        digest = await output.digest(common)
        if claimed.offset <= output.size:
            whole = await output.digest(claimed.offset, digest, common)
            if whole.hex() == claimed.digest:
                return claimed.offset, whole
        return common, digest
