"""The live feed on NATS JetStream; the only module that imports nats.

One subject for each job gives one order. Output is published without an acknowledgement: JetStream stores what one
connection sends in the order it was sent, so the acknowledgement of the last record (`sync`) covers all before it.

A reader is a push consumer of its own. nats-py has an ordered one, too, but it looks for its server only every ten
seconds, and goes on by sequence number, which a broker that lost the end of its log gives away a second time.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, Header, StorageType, StreamConfig
from nats.js.errors import BadRequestError, NoStreamResponseError, NotFoundError

from jobs.feed import FeedSettings, Take
from llm_pb import llm_pb2

T = TypeVar("T")

_log = logging.getLogger(__name__)
_PENDING_BYTES: Final = 4 * 1024 * 1024
"""What may be under way to the broker. Beyond it, and while the broker is away, records are lost."""
_RETRY_SECONDS: Final = 1
_PING_SECONDS: Final = 5
"""How often the broker must answer; a connection on which it does not is given up after three times this."""
_HEARTBEAT_SECONDS: Final = 1
_SILENCE_SECONDS: Final = 2.5 * _HEARTBEAT_SECONDS
"""A consumer that sent neither a record nor a heartbeat for so long is gone."""
_SUBSCRIBING: Final = 64
"""How many readers subscribe at once: after a restart of the broker all of them want to."""
_OTHER_CONFIG: Final = 10058
"""JetStream's error for a stream that exists with other settings."""


class _Consumer:
    """What one of the broker's consumers sends, up to where some of it may be missing."""

    def __init__(self, client: Client, take: Callable[[Msg], bool | None]) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """When no more is taken: True if `take` has enough. Raises what `take` raises."""
        self.heard_at = math.inf
        """When something came last, by the monotonic clock; before the broker is asked to send, never too long ago."""
        self._client = client
        self._take = take
        self._delivered = 0

    async def hear(self, message: Msg) -> None:
        """Take what comes."""
        self.heard_at = time.monotonic()
        if self.ended.done():
            return
        try:
            if message.headers is None:
                self._delivered += 1
                if message.metadata.sequence.consumer != self._delivered:
                    self.end()
                elif self._take(message):
                    self.ended.set_result(True)
            # A heartbeat or a request to say how far the reader is. Records have no headers.
            elif reply := message.reply or message.headers.get(Header.CONSUMER_STALLED):
                await self._client.publish(reply)
            elif message.headers.get(Header.LAST_CONSUMER) != str(self._delivered):
                self.end()
        except Exception as error:  # noqa: BLE001  # it is the reader's
            if not self.ended.done():
                self.ended.set_exception(error)

    def end(self) -> None:
        """Say that no more will come: another consumer must go on."""
        if not self.ended.done():
            self.ended.set_result(False)


class NatsFeed:
    """A Feed on a JetStream stream, which it creates when there is none."""

    def __init__(self, settings: FeedSettings) -> None:
        self._settings = settings
        self._client = Client()
        self._stream = self._client.jetstream(timeout=settings.timeout.total_seconds())
        self._ready = asyncio.Event()
        self._stream_unsure = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._consumers: set[_Consumer] = set()
        self._subscribing = asyncio.Semaphore(_SUBSCRIBING)
        self._losing = False
        self._outages = 0

    @property
    def outages(self) -> int:
        """See Feed."""
        return self._outages

    @property
    def available(self) -> bool:
        """See Feed."""
        return self._ready.is_set()

    def start(self) -> None:
        """Begin to connect, and go on trying: a service starts without its feed."""
        self._tasks = [asyncio.create_task(self._stay_ready()), asyncio.create_task(self._end_silent())]

    async def wait_ready(self) -> None:
        """Return once the stream is there."""
        await self._ready.wait()

    async def append(self, key: str, record: llm_pb2.FeedRecord) -> None:
        """See Feed."""
        if not self._ready.is_set() or self._client.pending_data_size > _PENDING_BYTES:
            self._losing = True
            return
        if self._losing:
            self._losing = False
            self._outages += 1
        try:
            await self._client.publish(self._subject(key), record.SerializeToString())
        except (NatsError, OSError) as error:
            self._losing = True
            _log.warning("feed lost a record: %r", error)

    async def sync(self, key: str, record: llm_pb2.FeedRecord) -> bool:
        """See Feed."""
        if not self._ready.is_set():
            return False
        try:
            await _answer(self._stream.publish(self._subject(key), record.SerializeToString()))
        except (NatsError, OSError, TimeoutError) as error:
            _log.warning("feed did not store a record: %r", error)
            self._note_failure(error)
            return False
        return True

    async def read(self, key: str, take: Take) -> None:
        """See Feed."""
        last: tuple[datetime, int] | None = None

        def take_new(message: Msg) -> bool | None:
            nonlocal last
            metadata = message.metadata
            place = (metadata.timestamp, metadata.sequence.stream)
            if last is not None and place <= last:
                return False
            last = place
            return take(llm_pb2.FeedRecord.FromString(message.data))

        enough = False
        while not enough:
            await self._ready.wait()
            try:
                enough = await self._deliver(self._subject(key), last and last[0], take_new)
            except (NatsError, OSError, TimeoutError) as error:
                _log.warning("feed cannot be read now: %r", error)
                self._note_failure(error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def remove(self, key: str) -> None:
        """See Feed."""
        if not self._ready.is_set():
            return
        try:
            await _answer(self._stream.purge_stream(self._settings.stream, subject=self._subject(key)))
        except (NatsError, OSError, TimeoutError) as error:
            _log.warning("feed did not forget a job: %r", error)

    async def close(self) -> None:
        """See Feed."""
        if self._client.is_connected:
            with contextlib.suppress(NatsError, OSError, TimeoutError):
                await self._client.flush(timeout=int(max(1, self._settings.timeout.total_seconds())))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _subject(self, key: str) -> str:
        return f"{self._settings.subject_prefix}.{key}"

    async def _deliver(self, subject: str, since: datetime | None, take: Callable[[Msg], bool | None]) -> bool:
        """Have what was stored from a moment on, or all, taken until it is enough: True; or until some may be missing.

        By time, not by sequence number: those of a stream that was lost, or lost its end, are given away again. What
        was stored in that same moment comes a second time.
        """
        address, consumer = self._client.new_inbox(), _Consumer(self._client, take)
        subscription = await self._client.subscribe(address, cb=consumer.hear)
        self._consumers.add(consumer)
        try:
            async with self._subscribing:
                config = ConsumerConfig(
                    filter_subject=subject,
                    deliver_subject=address,
                    deliver_policy=DeliverPolicy.ALL if since is None else DeliverPolicy.BY_START_TIME,
                    # Times are rounded on their way here.
                    opt_start_time=since and since - timedelta(milliseconds=1),
                    ack_policy=AckPolicy.NONE,
                    max_deliver=1,
                    num_replicas=1,
                    mem_storage=True,
                    flow_control=True,
                    idle_heartbeat=_HEARTBEAT_SECONDS,
                )
                await _answer(self._stream.add_consumer(self._settings.stream, config))
            consumer.heard_at = time.monotonic()
            return await consumer.ended
        finally:
            consumer.end()
            self._consumers.discard(consumer)
            # The broker drops a consumer that nobody listens to.
            with contextlib.suppress(NatsError, OSError):
                await subscription.unsubscribe()

    async def _end_silent(self) -> None:
        """Tell the readers whose consumers are gone. One clock for all: a timer for each record costs much more."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS / 2)
            for consumer in self._consumers:
                if time.monotonic() > consumer.heard_at + _SILENCE_SECONDS:
                    consumer.end()

    async def _stay_ready(self) -> None:
        while True:
            await self._stay_connected()
            # nats-py closes a client for good when the broker refuses it: its credentials were changed, say.
            _log.warning("the feed's broker has ended the connection")
            await asyncio.sleep(_RETRY_SECONDS)
            self._client = Client()
            self._stream = self._client.jetstream(timeout=self._settings.timeout.total_seconds())

    async def _stay_connected(self) -> None:
        """Connect, and keep the stream in place until the client is closed."""
        try:
            await _answer(self._connect())
            while not self._client.is_closed:
                self._stream_unsure.clear()
                try:
                    await self._make_stream()
                except (NatsError, OSError, TimeoutError) as error:
                    _log.warning("feed's stream cannot be made now: %r", error)
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                self._ready.set()
                await self._stream_unsure.wait()
        finally:
            await self._client.close()

    async def _connect(self) -> None:
        await self._client.connect(
            servers=self._settings.url.get_secret_value(),
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RETRY_SECONDS,
            connect_timeout=max(1, round(self._settings.timeout.total_seconds())),
            ping_interval=_PING_SECONDS,
            # Past this nats-py makes a publisher wait; append stays below it.
            pending_size=2 * _PENDING_BYTES,
            error_cb=_log_error,
            disconnected_cb=self._note_disconnect,
            reconnected_cb=self._note_change,
            closed_cb=self._note_change,
        )

    async def _make_stream(self) -> None:
        """Make the stream, or give one that is there the limits of the settings."""
        config = StreamConfig(
            name=self._settings.stream,
            subjects=[f"{self._settings.subject_prefix}.*"],
            storage=StorageType.FILE,
            max_age=self._settings.max_age.total_seconds(),
            max_bytes=self._settings.max_bytes,
        )
        try:
            await _answer(self._stream.add_stream(config))
        except BadRequestError as error:
            if error.err_code != _OTHER_CONFIG:
                raise
            await _answer(self._stream.update_stream(config))

    async def _note_disconnect(self) -> None:
        self._ready.clear()
        self._losing = True
        for consumer in self._consumers:
            consumer.end()

    async def _note_change(self) -> None:
        self._stream_unsure.set()

    def _note_failure(self, error: Exception) -> None:
        if isinstance(error, (NoStreamResponseError, NotFoundError)):
            # Somebody deleted the stream, and what it held and was sent since.
            self._losing = True
            self._stream_unsure.set()


async def _answer(asked: Awaitable[T]) -> T:
    """Return the broker's answer; raises CancelledError when the task was cancelled meanwhile.

    nats-py waits by asyncio.wait_for, which on Python 3.11 forgets a cancel that comes together with the answer.
    """
    task = asyncio.current_task()
    cancels = task.cancelling() if task else 0
    answer = await asked
    if task and task.cancelling() > cancels:
        raise asyncio.CancelledError
    return answer


async def _log_error(error: Exception) -> None:
    _log.info("feed: %r", error)
