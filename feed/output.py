"""What a job has made so far, read back from its live feed.

There the next attempt continues; and where none follows, it is what is left of attempts that could not say how they
ended: killed, cut off, or given up by Temporal.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from feed.feed import Feed, Fence
from feed.transcript import Transcript
from jobs.limits import MAX_OUTPUT_BYTES
from llm_pb import llm_pb2

_log = logging.getLogger(__name__)
_SILENCE_SECONDS: Final = 10
"""A feed from which nothing comes for so long, although there is more, is not to be waited for."""


@dataclass
class MadeOutput:
    """Output as the feed tells it: tokens, and the text that watchers were given for them."""

    token_ids: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    transcript: Transcript = field(default_factory=Transcript)
    """The output as watchers hold it: longer than the text while an attempt repeats what an earlier one generated."""
    first_token: datetime | None = None
    prompt_tokens: int = 0
    worker: str = ""
    """The worker that told of its progress last."""
    whole: bool = True
    """Whether no record is missing."""
    last_attempt: llm_pb2.AttemptStarted = field(default_factory=llm_pb2.AttemptStarted)
    """The attempt that had the feed last."""

    @property
    def can_continue(self) -> bool:
        """Whether there is output, and all of it."""
        return bool(self.token_ids) and self.whole

    def add(self, record: llm_pb2.FeedRecord) -> None:
        """Take a record, in order."""
        if record.HasField("tokens_made"):
            self._add_tokens(record.tokens_made)
        elif record.HasField("attempt_started"):
            self.last_attempt = record.attempt_started
        elif record.HasField("progress"):
            self.worker = record.progress.worker

    def _add_tokens(self, made: llm_pb2.TokensMade) -> None:
        self.transcript.put(made.offset, made.text)
        self.transcript.add_rewinds(made.rewinds, made.lowest_rewind_offset)
        if made.token_offset > len(self.token_ids) or made.offset > len(self.text):
            self.whole = False
            return
        if made.token_offset < len(self.token_ids) or made.offset < len(self.text):
            del self.token_ids[made.token_offset :]
            del self.text[made.offset :]
        if made.token_offset == 0:
            # An attempt that starts over closes every gap before it.
            self.whole = True
        self.token_ids += made.token_ids
        self.text += made.text.encode()
        if made.HasField("made_at") and self.first_token is None:
            self.first_token = made.made_at.ToDatetime(UTC)
            self.prompt_tokens = made.prompt_tokens

    def result(self) -> llm_pb2.JobResult:
        """Return the output as the partial result of a job that has failed."""
        output = self.text[:MAX_OUTPUT_BYTES].decode(errors="ignore")
        self.transcript.settle(output)
        metadata = llm_pb2.ResultMetadata(
            prompt_tokens=self.prompt_tokens,
            output_tokens=len(self.token_ids),
            worker=self.worker,
            attempts=self.last_attempt.attempt,
            start_time=self.last_attempt.start_time,
            rewinds=self.transcript.rewinds,
            lowest_rewind_offset=self.transcript.lowest_rewind,
        )
        if self.first_token is not None:
            metadata.first_token_time.FromDatetime(self.first_token)
        return llm_pb2.JobResult(output=output, finish_reason=llm_pb2.FINISH_REASON_ERROR, metadata=metadata)


async def read_made_output(feed: Feed, key: str, writer: str) -> MadeOutput:
    """Return what was made before the first record of `writer`, which must be in the feed already.

    Nothing when the feed does not answer.
    """
    made, fence = MadeOutput(), Fence()
    try:
        async with asyncio.timeout(_SILENCE_SECONDS) as silence:

            def take(record: llm_pb2.FeedRecord) -> bool:
                silence.reschedule(asyncio.get_running_loop().time() + _SILENCE_SECONDS)
                if record.writer == writer:
                    return True
                if fence.admits(record):
                    made.add(record)
                return False

            await feed.read(key, take)
    except TimeoutError:
        _log.warning("the feed of %s could not be read", key)
        return MadeOutput()
    return made
