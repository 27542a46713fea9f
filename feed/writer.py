"""The live feed from its writer's side: what one attempt publishes of its output."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from feed.feed import Feed
from feed.output import MadeOutput, read_made_output
from feed.transcript import Transcript
from llm_pb import llm_pb2

_TAKEOVER_PAUSES: Final = (0, 1, 2)
"""Seconds before each try to take the feed over: a broker that restarts is back by then."""
_REPEAT_SECONDS: Final = 5
"""Least time between two tries to repeat: a broker that does not answer must not slow the job."""
_REPEATED_AT_ONCE: Final = 100_000
"""Characters and tokens in one record of what is repeated: less than the megabyte that a broker takes."""


class FeedWriter:
    """One attempt's writer: it keeps the output that it has published, to repeat what a feed has lost."""

    def __init__(self, feed: Feed, key: str, started: llm_pb2.AttemptStarted) -> None:
        """`key` is the job's in the feed; `started` describes the attempt."""
        self.name = uuid.uuid4().hex
        """The writer in all its records, unguessable."""
        self.transcript = Transcript()
        """The output as watchers hold it, that of earlier attempts included."""
        self.output_bytes = 0
        """Size of this attempt's output in UTF-8 bytes, continued output included."""
        self.token_ids: list[int] = []
        self.prompt_tokens = 0
        self.first_token: datetime | None = None
        """When the first output token was generated."""
        self._feed = feed
        self._key = key
        self._started = started
        self._texts: list[str] = []
        self._outages = feed.outages
        self._repeat_at = 0.0

    @property
    def text(self) -> str:
        """This attempt's output, continued output included."""
        return "".join(self._texts)

    async def begin(self) -> None:
        """Take the feed over as the first attempt."""
        await self.write(self._takeover())

    async def take_over(self, reported_bytes: int) -> MadeOutput:
        """Take the feed over from earlier attempts and return what they generated; nothing when the feed is away.

        From here on every reader ignores what an earlier attempt may still write. `reported_bytes` is how much output
        one of them is known to have published.
        """
        made = MadeOutput()
        if await self._store_takeover():
            made = await read_made_output(self._feed, self._key, self.name)
        transcript = made.transcript
        transcript.add_rewinds(self.transcript.rewinds, self.transcript.lowest_rewind)
        if not (made.last_attempt.attempt and made.whole) or reported_bytes > len(transcript.data):
            # Watchers may hold output that is lost here, and whose place other output takes.
            transcript.add_rewinds(transcript.rewinds + 1, len(transcript.data))
        self.transcript = transcript
        return made

    async def _store_takeover(self) -> bool:
        """Return whether the feed has stored the record: tried for a while, for without it the job starts over."""
        for pause in _TAKEOVER_PAUSES:
            await asyncio.sleep(pause)
            if await self._feed.sync(self._key, self._takeover()):
                return True
        return False

    def restore(self, made: MadeOutput) -> None:
        """Make this the output so far: what earlier attempts generated, or nothing."""
        self._texts = [made.text.decode()]
        self.output_bytes = len(made.text)
        self.token_ids = made.token_ids
        self.prompt_tokens = made.prompt_tokens
        self.first_token = made.first_token

    def keep(self, text: str, token_ids: Sequence[int]) -> llm_pb2.TokensMade:
        """Append to the output; return what is to be published of it."""
        made = llm_pb2.TokensMade(
            offset=self.output_bytes, text=text, token_offset=len(self.token_ids), token_ids=token_ids
        )
        if not self.token_ids and token_ids:
            self._describe_first(made)
        self._texts.append(text)
        self.output_bytes += len(text.encode())
        self.token_ids += token_ids
        return made

    async def publish(self, made: llm_pb2.TokensMade) -> None:
        """Write what keep() returned, unless there is nothing in it."""
        if made.text or made.token_ids:
            self.transcript.put(made.offset, made.text)
            self._describe_rewinds(made)
            await self.write(llm_pb2.FeedRecord(tokens_made=made))

    async def write(self, record: llm_pb2.FeedRecord) -> None:
        """Write a record in this writer's name."""
        record.writer = self.name
        await self._feed.append(self._key, record)
        outages, now = self._feed.outages, time.monotonic()
        if outages != self._outages and now >= self._repeat_at:
            self._repeat_at = now + _REPEAT_SECONDS
            if await self._repeat():
                self._outages, self._repeat_at = outages, 0.0

    async def _repeat(self) -> bool:
        """Write all output into the feed again, which has lost a part of it: so that readers need not wait for the end.

        Those that have it already pass over it. Waits for each piece, so that many jobs do not overrun the feed again.
        Returns whether all of it is stored; if not, it is to be tried again.
        """
        text, ids, offset = self.text, self.token_ids, 0
        stored = await self._feed.sync(self._key, self._takeover())
        for start in range(0, max(len(text), len(ids)), _REPEATED_AT_ONCE):
            if not stored:
                return False
            end = start + _REPEATED_AT_ONCE
            made = llm_pb2.TokensMade(
                offset=offset, text=text[start:end], token_offset=min(start, len(ids)), token_ids=ids[start:end]
            )
            if start == 0:
                self._describe_first(made)
                self._describe_rewinds(made)
            stored = await self._feed.sync(self._key, llm_pb2.FeedRecord(writer=self.name, tokens_made=made))
            offset += len(made.text.encode())
        return stored

    def _describe_first(self, made: llm_pb2.TokensMade) -> None:
        """Say with the first token what is not known before it, and does not change after it."""
        made.prompt_tokens = self.prompt_tokens
        if self.first_token is not None:
            made.made_at.FromDatetime(self.first_token.astimezone(UTC))

    def _describe_rewinds(self, made: llm_pb2.TokensMade) -> None:
        made.rewinds = self.transcript.rewinds
        made.lowest_rewind_offset = self.transcript.lowest_rewind

    def _takeover(self) -> llm_pb2.FeedRecord:
        return llm_pb2.FeedRecord(writer=self.name, attempt_started=self._started)
