"""Reads back the output that a job has left on its live feed, for a job whose workflow can no longer do that."""

import asyncio
import logging
import uuid
from typing import Final

from encryption import KeysUnavailable
from feed.feed import Feed
from feed.output import GeneratedOutput, read_generated_output
from llm_pb import common_pb2, internal_pb2, llm_pb2
from store.outputs import write_output
from store.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)
_READER: Final = "gateway"
"""The writer of the mark up to which the output of an ended job is read. Every gateway uses the same name."""
_SECONDS: Final = 1
"""Maximum seconds to wait for a mark that may not exist."""
_WRITE_SECONDS: Final = 15
"""Maximum seconds to write a recovered output to the store: the activity has 30 s for all."""
_RETRY_SECONDS: Final = 1


async def recovered_output(
    feed: Feed, key: str, store: Store | None, job_id: str, max_inline_bytes: int = 0
) -> llm_pb2.JobResult | None:
    """Close the job's feed and return the output that it holds; None when the feed is unavailable.

    What an attempt writes later does not count. A large output becomes a file. Without a store, or while it is away, it
    is cut. `max_inline_bytes` is that of the RunRequest.
    """
    output = await _closed_output(feed, key, uuid.uuid4().hex)
    if output is None:
        return None
    file = None
    if store is not None and output.is_large(max_inline_bytes):
        try:
            async with asyncio.timeout(_WRITE_SECONDS):
                file = await _written(store, job_id, output)
        except TimeoutError:
            _log.error("the store is away: the partial output of %s is cut", job_id)
    return output.result(file=file)


async def _written(store: Store, job_id: str, output: GeneratedOutput) -> common_pb2.FileRef:
    while True:
        try:
            return await write_output(store, job_id, output.text)
        except (StoreUnavailable, KeysUnavailable) as error:
            _log.warning("a partial output cannot be written to the store yet: %s", error)
            await asyncio.sleep(_RETRY_SECONDS)


async def _closed_output(feed: Feed, key: str, writer: str) -> GeneratedOutput | None:
    ending = internal_pb2.FeedRecord(writer=writer, job_ending=internal_pb2.JobEnding())
    if not await feed.sync(key, ending):
        return None
    return await read_generated_output(feed, key, writer)


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
        output = await _closed_output(feed, key, _READER)
        result = output.result() if output is not None else None
    return result if result is not None and result.metadata.attempts else None
