"""The writer of a live feed: one attempt that takes the feed over and publishes its output."""

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from feed.feed import Feed
from feed.output import GeneratedOutput, read_generated_output
from jobs.attempts import merged
from llm_pb import internal_pb2, llm_pb2

_TAKEOVER_PAUSES: Final = (0, 1, 2)
"""Seconds before each try to take the feed over. A broker that restarts is available by then."""
_REPEAT_SECONDS: Final = 5
"""Minimum time between two tries to repeat the output. A broker that does not answer must not slow the job."""
_MAX_REPEATED: Final = 100_000
"""Maximum number of characters, and of tokens, in one record of repeated output. A broker accepts a megabyte."""
_MAX_LOGPROBS_BYTES: Final = 512 * 1024
"""Maximum size of the log probabilities in one record."""


class FeedWriter:
    """One attempt's writer. It keeps the output that it has published, in order to repeat what a feed has lost."""

    def __init__(self, feed: Feed, key: str, started: internal_pb2.AttemptStarted) -> None:
        """`key` is the job's in the feed; `started` describes the attempt."""
        self.name = uuid.uuid4().hex
        """The writer's unguessable name, which all its records carry."""
        self.output = GeneratedOutput()
        """The job's output so far, with the part that this attempt continues. Read-only."""
        self._feed = feed
        self._key = key
        self._takeover = internal_pb2.FeedRecord(writer=self.name, attempt_started=started)
        self._reported_bytes = 0
        self._reported_tokens = 0
        self._reported_attempts: Sequence[llm_pb2.JobAttempt] = ()
        self._recoveries = feed.recoveries
        self._repeat_at = 0.0
        self.output.add(self._takeover)

    def restore(self, heartbeat: internal_pb2.RunHeartbeat) -> None:
        """Restore the output's size, rewinds, wasted tokens and attempts, as an earlier attempt reported them.

        Call it before take_over.
        """
        self._reported_bytes = heartbeat.progress.output_bytes
        self._reported_attempts = heartbeat.attempts
        earlier = heartbeat.metadata
        self._reported_tokens = earlier.output_tokens
        self.output.wasted_tokens = earlier.wasted_tokens
        self.output.transcript.add_rewinds(earlier.rewinds, earlier.lowest_rewind_offset)

    async def begin(self) -> None:
        """Take the feed over as the job's first attempt."""
        await self.write(self._takeover)

    async def take_over(self) -> internal_pb2.AttemptStarted:
        """Take the feed over from earlier attempts, with their output; return the last of them, empty if none is known.

        From here on every reader ignores what an earlier attempt may still write. The output is empty if the feed is
        unavailable.
        """
        output = GeneratedOutput()
        if await self._store_takeover():
            output = await read_generated_output(self._feed, self._key, self.name)
        earlier, transcript = output.last_attempt, output.transcript
        transcript.add_rewinds(self.output.transcript.rewinds, self.output.transcript.lowest_rewind)
        if not (earlier.attempt and output.whole) or self._reported_bytes > len(transcript.data):
            # Watchers may hold output that is lost here and will be replaced.
            transcript.add_rewinds(transcript.rewinds + 1, len(transcript.data))
        output.wasted_tokens = max(output.wasted_tokens, self.output.wasted_tokens)
        output.dropped_tokens = max(self._reported_tokens - len(output.token_ids), 0)
        output.add(self._takeover)
        *known, this = output.attempts
        output.attempts = merged(self._reported_attempts, known)
        output.add_attempt(this)
        self.output = output
        return earlier

    async def read_back(self) -> None:
        """Take the output of earlier attempts, for a job that ends without another one: nothing is written.

        The feed must be one whose `read` ends by itself.
        """
        self.output = await read_generated_output(self._feed, self._key, self.name)

    async def _store_takeover(self) -> bool:
        """Store the takeover, with retries, because without it the job starts over; return whether it is stored."""
        for pause in _TAKEOVER_PAUSES:
            await asyncio.sleep(pause)
            if await self._feed.sync(self._key, self._takeover):
                return True
        return False

    def start_over(self) -> None:
        """Start over at the first token. The output that follows replaces the output so far."""
        self.output.clear()

    async def append(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[llm_pb2.TokenLogprobs] = (),
        *,
        prompt_tokens: int,
        at: datetime,
    ) -> None:
        """Append to the output, and publish the new part. `at` is when the tokens were generated."""
        output = self.output
        output.prompt_tokens = prompt_tokens
        if token_ids and output.first_token is None:
            output.first_token = at
        if not (text or token_ids):
            return
        made = internal_pb2.TokensMade(
            offset=len(output.text), text=text, token_offset=len(output.token_ids), token_ids=token_ids
        )
        for piece in _pieces(made, logprobs) if logprobs else (made,):
            record = internal_pb2.FeedRecord(tokens_made=piece)
            if token_ids and not output.token_ids:
                self._describe_first(record.tokens_made)
            output.add(record)
            self._describe_replaced(record.tokens_made)
            await self.write(record)

    async def write(self, record: internal_pb2.FeedRecord) -> None:
        """Write a record in this writer's name."""
        record.writer = self.name
        await self._feed.append(self._key, record)
        recoveries, now = self._feed.recoveries, time.monotonic()
        if recoveries != self._recoveries and now >= self._repeat_at:
            self._repeat_at = now + _REPEAT_SECONDS
            if await self._repeat():
                self._recoveries, self._repeat_at = recoveries, 0.0

    async def _repeat(self) -> bool:
        """Write the whole output again into a feed that has lost a part of it; return whether all of it is stored.

        Then readers need not wait for the outcome. Those that have the output already ignore the repeated records.
        Waits for each piece, so that many jobs do not overload the feed again.
        """
        stored = await self._feed.sync(self._key, self._takeover)
        for number, made in enumerate(self._repeated()):
            if not stored:
                return False
            if number == 0:
                self._describe_first(made)
                self._describe_replaced(made)
            stored = await self._feed.sync(self._key, internal_pb2.FeedRecord(writer=self.name, tokens_made=made))
        return stored

    def _repeated(self) -> Iterator[internal_pb2.TokensMade]:
        """Yield the whole output in records that a broker accepts."""
        text, ids, offset = self.output.text.decode(), self.output.token_ids, 0
        if logprobs := self.output.logprobs:
            yield from _pieces(internal_pb2.TokensMade(text=text, token_ids=ids), logprobs)
            return
        for start in range(0, max(len(text), len(ids)), _MAX_REPEATED):
            end = start + _MAX_REPEATED
            made = internal_pb2.TokensMade(
                offset=offset, text=text[start:end], token_offset=min(start, len(ids)), token_ids=ids[start:end]
            )
            yield made
            offset += len(made.text.encode())

    def _describe_first(self, made: internal_pb2.TokensMade) -> None:
        """Add to the first token's record what is unknown before it and does not change after it."""
        made.prompt_tokens = self.output.prompt_tokens
        if self.output.first_token is not None:
            made.made_at.FromDatetime(self.output.first_token.astimezone(UTC))

    def _describe_replaced(self, made: internal_pb2.TokensMade) -> None:
        made.wasted_tokens = self.output.wasted_tokens
        made.rewinds = self.output.transcript.rewinds
        made.lowest_rewind_offset = self.output.transcript.lowest_rewind


def _pieces(
    made: internal_pb2.TokensMade, logprobs: Sequence[llm_pb2.TokenLogprobs]
) -> Iterator[internal_pb2.TokensMade]:
    """Yield a record's tokens with their log probabilities, in as many records as their size needs."""
    text, first = made.text.encode(), 0
    while True:
        size, last = logprobs[first].ByteSize(), first + 1
        while last < len(logprobs) and (size := size + logprobs[last].ByteSize()) <= _MAX_LOGPROBS_BYTES:
            last += 1
        begin = logprobs[first].offset - made.offset if first else 0
        end = logprobs[last].offset - made.offset if last < len(logprobs) else len(text)
        yield internal_pb2.TokensMade(
            offset=made.offset + begin,
            text=text[begin:end].decode(),
            token_offset=made.token_offset + first,
            token_ids=made.token_ids[first:last],
            logprobs=logprobs[first:last],
        )
        if last == len(logprobs):
            return
        first = last
