"""Reads back the output that a job has left on its live feed, for a job whose workflow can no longer do that."""

import asyncio
import uuid
from typing import Final

from feed.feed import Feed
from feed.output import read_generated_output
from llm_pb import internal_pb2, llm_pb2

_READER: Final = "gateway"
"""The writer of the mark up to which the output of an ended job is read. Every gateway uses the same name."""
_SECONDS: Final = 1
"""Maximum seconds to wait for a mark that may not exist."""


async def close_feed(feed: Feed, key: str, writer: str | None = None) -> llm_pb2.JobResult | None:
    """Close the job's feed and return the output that it holds; None when the feed is unavailable.

    What an attempt writes later does not count.
    """
    writer = writer or uuid.uuid4().hex
    ending = internal_pb2.FeedRecord(writer=writer, job_ending=internal_pb2.JobEnding())
    if not await feed.sync(key, ending):
        return None
    return (await read_generated_output(feed, key, writer)).result()


async def left_output(feed: Feed, key: str) -> llm_pb2.JobResult | None:
    """Return the partial output of a job that Temporal has ended before its outcome was settled.

    Return None when no attempt began, when the feed is unavailable, or when its retention is over. The first call marks
    the end of the output, so that every later call returns the same.
    """
    result: llm_pb2.JobResult | None
    try:
        async with asyncio.timeout(_SECONDS):
            result = (await read_generated_output(feed, key, _READER)).result()
    except TimeoutError:
        result = await close_feed(feed, key, _READER)
    return result if result is not None and result.metadata.attempts else None
