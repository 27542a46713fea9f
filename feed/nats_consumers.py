"""Readers of the live feed from NATS JetStream, each by a push consumer of its own.

nats-py has an ordered consumer, too. But it checks its server only every ten seconds, and it continues by sequence
number, which a broker that lost the end of its log assigns a second time.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, Header

T = TypeVar("T")
MessageHandler = Callable[[Msg], bool | None]
"""A reader's callback, called with each message, in order. Returns True once the reader needs no more. Raises
nothing."""

_HEARTBEAT_SECONDS: Final = 1
_SILENCE_SECONDS: Final = 2.5 * _HEARTBEAT_SECONDS
"""Maximum time between two messages of a consumer, records or heartbeats. One that is silent for longer is lost."""
_SUBSCRIBING: Final = 64
"""Maximum number of readers that subscribe concurrently. After a restart of the broker all of them subscribe."""


class _Consumer:
    """One of the broker's consumers, up to where messages may be missing."""

    def __init__(self, client: Client, on_message: MessageHandler, caught_up: Callable[[], None]) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Done when the consumer has ended: True if `on_record` needs no more, False if messages may be missing."""
        self.heard_at = math.inf
        """When the last message came, by the monotonic clock. Infinite, so never too long ago, before the consumer is
        added."""
        self._client = client
        self._on_message = on_message
        self._caught_up = caught_up
        self._delivered = 0
        self._stored = math.inf

    def begin(self, stored: int) -> None:
        """Note that the broker began to send, with so many records stored."""
        self.heard_at = time.monotonic()
        self._stored = stored
        if self._delivered >= stored:
            self._caught_up()

    async def hear(self, message: Msg) -> None:
        """Handle a message from the broker."""
        self.heard_at = time.monotonic()
        if self.ended.done():
            return
        try:
            if message.headers is None:
                self._delivered += 1
                if message.metadata.sequence.consumer != self._delivered:
                    self.end()
                elif self._on_message(message):
                    self.ended.set_result(True)
                elif self._delivered == self._stored:
                    self._caught_up()
            # This is a heartbeat or a flow control request. Records have no headers.
            elif reply := message.reply or message.headers.get(Header.CONSUMER_STALLED):
                await self._client.publish(reply)
            elif message.headers.get(Header.LAST_CONSUMER) != str(self._delivered):
                self.end()
        except Exception as error:  # noqa: BLE001  # nats-py would only log it
            if not self.ended.done():
                self.ended.set_exception(error)

    def end(self) -> None:
        """End the consumer, unless it has ended. Another one must continue."""
        if not self.ended.done():
            self.ended.set_result(False)


class Consumers:
    """All consumers of this process."""

    def __init__(self, stream: str) -> None:
        """`stream` is the name of the stream that they read."""
        self._stream = stream
        self._open: set[_Consumer] = set()
        self._subscribing = asyncio.Semaphore(_MAX_SUBSCRIBING)

    async def deliver(
        self,
        client: Client,
        jetstream: JetStreamContext,
        subject: str,
        since: datetime | None,
        on_message: MessageHandler,
        caught_up: Callable[[], None],
    ) -> bool:
        """Deliver messages to `on_record` from `since` on, or all of them if it is None.

        Return True once `on_record` needs no more, False as soon as a message may have been missed. Messages are
        selected by time, not by sequence number, because a stream that was lost, or lost its end, assigns sequence
        numbers again. A message that was stored exactly at `since` comes a second time. `caught_up` is called once all
        messages that were stored when the broker began to send have been handled. Raises NatsError, OSError or
        TimeoutError when the broker does not send.
        """
        address, consumer = client.new_inbox(), _Consumer(client, on_message, caught_up)
        subscription = await client.subscribe(address, cb=consumer.hear)
        self._open.add(consumer)
        try:
            async with self._subscribing:
                config = ConsumerConfig(
                    filter_subject=subject,
                    deliver_subject=address,
                    deliver_policy=DeliverPolicy.ALL if since is None else DeliverPolicy.BY_START_TIME,
                    # The times of messages are rounded.
                    opt_start_time=since and since - timedelta(milliseconds=1),
                    ack_policy=AckPolicy.NONE,
                    max_deliver=1,
                    num_replicas=1,
                    mem_storage=True,
                    flow_control=True,
                    idle_heartbeat=_HEARTBEAT_SECONDS,
                )
                info = await reraise_cancel(jetstream.add_consumer(self._stream, config))
            # The broker may have sent some messages before it reported how many are left.
            sent = info.delivered.consumer_seq if info.delivered else 0
            consumer.begin((info.num_pending or 0) + sent)
            return await consumer.ended
        finally:
            consumer.end()
            self._open.discard(consumer)
            # The broker removes a consumer that has no subscriber.
            with contextlib.suppress(NatsError, OSError):
                await subscription.unsubscribe()

    def end(self) -> None:
        """End all consumers."""
        for consumer in self._open:
            consumer.end()

    async def end_silent(self) -> None:
        """End silent consumers, until cancelled. One clock serves them all, because a timer for each record costs much
        more."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS / 2)
            for consumer in self._open:
                if time.monotonic() > consumer.heard_at + _SILENCE_SECONDS:
                    consumer.end()


async def reraise_cancel(asked: Awaitable[T]) -> T:
    """Return the broker's answer. Raises CancelledError if the task was cancelled meanwhile.

    nats-py waits with asyncio.wait_for, which on Python 3.11 loses a cancel that comes together with the answer.
    """
    task = asyncio.current_task()
    cancels = task.cancelling() if task else 0
    answer = await request
    if task and task.cancelling() > cancels:
        raise asyncio.CancelledError
    return answer
