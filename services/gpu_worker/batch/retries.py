"""The wait of an item for its next attempt. The log of the chunk has it, so that its rest goes on at another worker."""

from collections.abc import Iterable
from datetime import datetime, timedelta

from jobs.errors import MAX_RETRY_AFTER
from llm_pb import internal_pb2

_NONE = timedelta()


def rest_of_wait(records: Iterable[internal_pb2.FeedRecord], now: datetime) -> timedelta:
    """Return how long an item still has to wait by its records in the log, of which all count. 0: it need not wait.

    The clock of the worker that has written them may be another one. However far ahead it is, the rest is no longer
    than the whole wait, and than MAX_RETRY_AFTER.
    """
    writer, wait, until = "", _NONE, now
    for record in records:
        if record.HasField("attempt_ended"):
            ended = record.attempt_ended
            writer, wait = record.writer, min(ended.retry_after.ToTimedelta(), MAX_RETRY_AFTER)
            until = ended.attempt.end_time.ToDatetime(now.tzinfo) + wait
        elif record.HasField("attempt_started") and record.writer != writer:
            # The next attempt has begun. The same writer repeats what the feed may have lost.
            wait = _NONE
    return min(max(until - now, _NONE), wait)
