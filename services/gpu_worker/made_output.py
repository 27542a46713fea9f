"""What earlier attempts at a job have made, read back from its live feed: there the next attempt continues."""

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from jobs.feed import Feed, Fence
from llm_pb import llm_pb2

_log = logging.getLogger(__name__)
_READ_SECONDS: Final = 10
"""A log takes well under a second to read; a feed that takes this long is not to be waited for."""


@dataclass
class MadeOutput:
    """Output as the feed tells it: tokens, and the text that watchers were given for them."""

    token_ids: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    first_token: datetime | None = None
    whole: bool = True
    """Whether no record is missing."""
    last_attempt: llm_pb2.AttemptStarted = field(default_factory=llm_pb2.AttemptStarted)
    """The attempt that had the feed last."""

    @property
    def can_continue(self) -> bool:
        """Whether there is output, and all of it."""
        return bool(self.token_ids) and self.whole

    def add(self, made: llm_pb2.TokensMade) -> None:
        """Take a record, in order."""
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


async def read_made_output(feed: Feed, key: str, writer: str) -> MadeOutput:
    """Return what was made before the attempt `writer` took over, whose AttemptStarted must be in the feed already.

    Nothing when the feed does not answer.
    """
    made, fence = MadeOutput(), Fence()
    try:
        async with asyncio.timeout(_READ_SECONDS), aclosing(feed.read(key)) as records:
            async for record in records:
                if record.writer == writer:
                    break
                if fence.admits(record):
                    if record.HasField("tokens_made"):
                        made.add(record.tokens_made)
                    elif record.HasField("attempt_started"):
                        made.last_attempt = record.attempt_started
    except TimeoutError:
        _log.warning("the feed of %s could not be read: the job starts over", key)
        return MadeOutput()
    return made
