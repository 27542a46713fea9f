"""The output that a job has generated so far, read from the records of its live feed.

The attempt that writes the records keeps it, and reports it when it fails. The next attempt reads it back and continues
there. If no attempt follows, it is the partial output of attempts that could not report how they ended, because they
were killed, disconnected or given up by Temporal.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from feed.feed import Feed, Fence
from feed.transcript import Transcript
from jobs import attempts
from jobs.limits import MAX_INLINE_BYTES, MAX_OUTPUT_BYTES, MAX_RESULT_BYTES
from llm_pb import common_pb2, internal_pb2, llm_pb2

_log = logging.getLogger(__name__)
_SILENCE_SECONDS: Final = 10
"""Maximum wait for the next record of a feed that holds more."""


@dataclass
class GeneratedOutput:
    """Tokens, and the text that watchers received for them. It is the same at the writer and at its readers."""

    token_ids: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    """In UTF-8."""
    logprobs: list[llm_pb2.TokenLogprobs] = field(default_factory=list)
    """One for each token, where the job asks for them and all writers were of a version that publishes them."""
    transcript: Transcript = field(default_factory=Transcript)
    """The output as watchers hold it: longer than the text while an attempt repeats what an earlier one generated."""
    first_token: datetime | None = None
    """When the first of the tokens was generated."""
    prompt_tokens: int = 0
    wasted_tokens: int = 0
    """As in ResultMetadata."""
    dropped_tokens: int = 0
    """Number of tokens that are lost or were dropped. They are wasted once the next token is generated."""
    worker: str = ""
    """The worker of the last attempt."""
    whole: bool = True
    """Whether no record is missing."""
    last_attempt: internal_pb2.AttemptStarted = field(default_factory=internal_pb2.AttemptStarted)
    """The attempt that took the feed over last. Empty if none is known."""
    attempts: list[llm_pb2.JobAttempt] = field(default_factory=list)
    """The attempts, as JobResult lists them."""

    @property
    def can_continue(self) -> bool:
        """Whether there is output, and none of it is missing."""
        return bool(self.token_ids) and self.whole

    def add(self, record: internal_pb2.FeedRecord) -> None:
        """Add the next record."""
        if record.HasField("tokens_made"):
            self._add_tokens(record.tokens_made)
        elif record.HasField("attempt_started"):
            self.last_attempt = started = record.attempt_started
            # Workers of version 0.1.0 name themselves only when they report progress.
            self.worker = started.worker or self.worker
            if self.attempts:
                attempts.lose(self.attempts[-1])
            # Version 0.1.0 reports no attempt's end.
            if started.worker:
                self.add_attempt(
                    llm_pb2.JobAttempt(attempt=started.attempt, worker=started.worker, start_time=started.start_time)
                )
        elif record.HasField("progress"):
            self.worker = record.progress.worker
            if self.last_attempt.worker:
                # The end of an attempt that does not report one.
                self.attempts[-1].end_time.CopyFrom(record.progress.updated_at)
        elif record.HasField("attempt_ended") and record.attempt_ended.HasField("attempt") and self.attempts:
            self.attempts[-1] = record.attempt_ended.attempt

    def add_attempt(self, attempt: llm_pb2.JobAttempt) -> None:
        """Add the attempt that runs now to the attempts."""
        self.attempts = attempts.bounded([*self.attempts, attempt])

    def _add_tokens(self, made: internal_pb2.TokensMade) -> None:
        logprobs = made.logprobs
        self.transcript.put(made.offset, made.text, made.token_offset, logprobs)
        self.transcript.add_rewinds(made.rewinds, made.lowest_rewind_offset)
        if made.token_offset > len(self.token_ids) or made.offset > len(self.text):
            self.whole = False
            return
        if made.token_offset < len(self.token_ids) or made.offset < len(self.text):
            del self.token_ids[made.token_offset :]
            del self.logprobs[made.token_offset :]
            del self.text[made.offset :]
        if made.token_offset == 0:
            # An attempt that starts over closes every gap before it.
            self.whole = True
        if made.token_ids:
            # Until now they may be found again: by another attempt, in a feed that was unavailable.
            self.wasted_tokens, self.dropped_tokens = self.wasted_tokens + self.dropped_tokens, 0
        self.wasted_tokens = max(self.wasted_tokens, made.wasted_tokens)
        self.token_ids += made.token_ids
        self.text += made.text.encode()
        if logprobs:
            self.logprobs += logprobs
        if made.HasField("made_at"):
            # The time changes where an attempt has started over.
            self.first_token = made.made_at.ToDatetime(UTC)
            self.prompt_tokens = made.prompt_tokens

    def clear(self) -> None:
        """Drop the tokens and their text, because an attempt starts over. Watchers still hold the transcript."""
        self.dropped_tokens += len(self.token_ids)
        self.token_ids, self.text, self.logprobs = [], bytearray(), []
        self.first_token, self.prompt_tokens = None, 0
        self.whole = True

    def metadata(self) -> llm_pb2.ResultMetadata:
        """Return the part of the result's metadata that the records hold. Timings, engine and model are not in them."""
        metadata = llm_pb2.ResultMetadata(
            prompt_tokens=self.prompt_tokens,
            output_tokens=len(self.token_ids),
            worker=self.worker,
            attempts=self.last_attempt.attempt,
            start_time=self.last_attempt.start_time,
            rewinds=self.transcript.rewinds,
            lowest_rewind_offset=self.transcript.lowest_rewind,
            wasted_tokens=self.wasted_tokens,
        )
        if self.first_token is not None:
            metadata.first_token_time.FromDatetime(self.first_token)
        return metadata

    def is_large(self, max_inline_bytes: int) -> bool:
        """Return whether the output has to be a file, where it may be one. 0: the default of RunRequest."""
        size = len(self.text) + sum(place.ByteSize() for place in self.logprobs)
        return size > (max_inline_bytes or MAX_INLINE_BYTES)

    def result(
        self,
        reason: "llm_pb2.FinishReason.ValueType" = llm_pb2.FINISH_REASON_ERROR,
        file: common_pb2.FileRef | None = None,
    ) -> llm_pb2.JobResult:
        """Return the output as a job's result: by default the partial result of a job that has failed.

        `file` holds the whole output. Without one an output that is too large for a message is cut.
        """
        output = self.text[: None if file else MAX_OUTPUT_BYTES].decode(errors="ignore")
        self.transcript.settle(output, self.logprobs)
        result = llm_pb2.JobResult(
            output="" if file else output,
            finish_reason=reason,
            metadata=self.metadata(),
            attempts=self.attempts,
            output_file=file,
        )
        if len(self.logprobs) == len(self.token_ids):
            result.logprobs.extend(self.logprobs)
            if result.ByteSize() > MAX_RESULT_BYTES:
                result.ClearField("logprobs")
        return result


async def read_generated_output(feed: Feed, key: str, writer: str) -> GeneratedOutput:
    """Return what was generated before the first record of `writer`, which must be in the feed already.

    The output is empty if the feed does not answer.
    """
    output, fence = GeneratedOutput(), Fence()
    try:
        async with asyncio.timeout(_SILENCE_SECONDS) as silence:

            def on_record(record: internal_pb2.FeedRecord) -> bool:
                silence.reschedule(asyncio.get_running_loop().time() + _SILENCE_SECONDS)
                if record.writer == writer:
                    return True
                if fence.admits(record):
                    output.add(record)
                return False

            await feed.read(key, on_record)
    except TimeoutError:
        _log.warning("the feed of %s could not be read", key)
        return GeneratedOutput()
    return output
