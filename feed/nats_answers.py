"""The cache of answers on NATS JetStream: a stream that keeps the last message of each subject, for its own time.

    <prefix>.claim.<key>            who generates now; empty once it is released
    <prefix>.answer.<key>.<job>     an answer, so that the purge of `<prefix>.answer.*.<job>` removes a job's

It is no KV bucket, because a bucket that is full refuses what is new, and this drops what is old.
"""

import logging
import math
import time
from collections.abc import Awaitable
from datetime import timedelta
from hashlib import sha256
from typing import Final, TypeVar

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, Header, StorageType, StreamConfig
from nats.js.errors import APIError, NotFoundError

from feed.answers import CLAIM_SECONDS, CacheUnavailable, Entry
from feed.feed import FeedSettings
from feed.nats import NatsFeed
from feed.nats_consumers import reraise_cancel

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_PAUSE_SECONDS: Final = 5.0
"""Time for which a cache that does not answer is left alone, so that it does not delay each job."""
_MAX_AGE: Final = timedelta(days=31)
"""Maximum age of whatever is in the stream. Each message has a time of its own, which is shorter."""
_WRONG_LAST_SEQUENCE: Final = (10071, 10164)
_RELEASED_SECONDS: Final = 1
_CLAIM: Final = b"claimed"


class NatsAnswers:
    """An AnswerStore on the connection of the feed. It needs NATS 2.11 or newer."""

    def __init__(self, feed: NatsFeed, settings: FeedSettings, claim_seconds: int = CLAIM_SECONDS) -> None:
        self._feed = feed
        self._settings = settings
        self._claim_seconds = claim_seconds
        self._prefix = settings.cache_subject_prefix
        self._ready: Client | None = None
        """The client with which the stream was found last."""
        self._retry_at = 0.0

    async def find(self, key: str) -> Entry:
        """See AnswerStore."""
        stream = await self._stream()
        # An answer that is stored after this is found, or its claim has another turn.
        claim = await self._last(stream, f"{self._prefix}.claim.{key}")
        answer = await self._last(stream, f"{self._prefix}.answer.{key}.*")
        claimed = claim is not None and claim[1] == _CLAIM
        return Entry(None if answer is None else answer[1], claimed, 0 if claim is None else claim[0])

    async def claim(self, key: str, turn: int) -> int | None:
        """See AnswerStore."""
        return await self._write_claim(key, turn, _CLAIM, self._claim_seconds)

    async def release(self, key: str, turn: int) -> None:
        """See AnswerStore."""
        await self._write_claim(key, turn, b"", _RELEASED_SECONDS)

    async def put(self, key: str, job_id: str, data: bytes, ttl: timedelta) -> None:
        """See AnswerStore."""
        stream = await self._stream()
        subject, seconds = f"{self._prefix}.answer.{key}.{_token(job_id)}", math.ceil(ttl.total_seconds())
        await self._asked(stream.publish(subject, data, msg_ttl=seconds))

    async def forget(self, job_id: str) -> bool:
        """See AnswerStore."""
        try:
            stream, subject = self._connected(), f"{self._prefix}.answer.*.{_token(job_id)}"
            return await self._asked(stream.purge_stream(self._settings.cache_stream, subject=subject))
        except NotFoundError:
            # Nobody has used the cache yet.
            return True
        except CacheUnavailable as error:
            _log.warning("the cache did not forget a job: %s", error)
            return False

    async def _write_claim(self, key: str, turn: int, data: bytes, seconds: int) -> int | None:
        stream = await self._stream()
        expected = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(turn)}
        subject = f"{self._prefix}.claim.{key}"
        try:
            return (await self._asked(stream.publish(subject, data, headers=expected, msg_ttl=seconds))).seq
        except APIError as error:
            if error.err_code in _WRONG_LAST_SEQUENCE:
                return None
            raise self._unavailable(error) from error

    async def _last(self, stream: JetStreamContext, subject: str) -> tuple[int, bytes] | None:
        try:
            found = await self._asked(stream.get_last_msg(self._settings.cache_stream, subject))
        except NotFoundError:
            return None
        return found.seq or 0, found.data or b""

    def _connected(self) -> JetStreamContext:
        if not self._feed.available:
            raise CacheUnavailable("NATS is not connected")
        return self._feed.client.jetstream(timeout=self._settings.timeout.total_seconds())

    async def _stream(self) -> JetStreamContext:
        """Return the context of the stream, which is created if there is none."""
        if time.monotonic() < self._retry_at:
            raise CacheUnavailable("it did not answer a moment ago")
        stream, client = self._connected(), self._feed.client
        if self._ready is client:
            return stream
        config = StreamConfig(
            name=self._settings.cache_stream,
            subjects=[f"{self._prefix}.>"],
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_age=_MAX_AGE.total_seconds(),
            max_bytes=self._settings.cache_max_bytes,
            max_msgs_per_subject=1,
            num_replicas=self._settings.replicas,
            allow_msg_ttl=True,
        )
        try:
            found = (await self._asked(stream.stream_info(self._settings.cache_stream))).config
        except NotFoundError:
            found = (await self._asked(stream.add_stream(config))).config
        if (found.max_bytes, found.num_replicas) != (config.max_bytes, config.num_replicas):
            found = (await self._asked(stream.update_stream(config))).config
        if not found.allow_msg_ttl:
            raise self._unavailable("its stream has no times of messages, which NATS has from 2.11 on")
        self._ready = client
        return stream

    async def _asked(self, asking: Awaitable[_T]) -> _T:
        """Return what the broker answers. Raises NotFoundError and APIError as they are, else CacheUnavailable."""
        try:
            return await reraise_cancel(asking)
        except NotFoundError:
            raise
        except APIError as error:
            if error.err_code in _WRONG_LAST_SEQUENCE:
                raise
            raise self._unavailable(error) from error
        except (NatsError, OSError, TimeoutError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, why: object) -> CacheUnavailable:
        if self._ready is not None or not self._retry_at:
            _log.warning("the cache of answers is unavailable: %r", why)
        self._retry_at = time.monotonic() + _PAUSE_SECONDS
        self._ready = None
        return CacheUnavailable(str(why) or type(why).__name__)


def _token(job_id: str) -> str:
    return sha256(job_id.encode()).hexdigest()
