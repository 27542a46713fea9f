"""How the live feed is read from NATS JetStream: each reader by a push consumer of its own.

nats-py has an ordered one, too, but it looks for its server only every ten seconds, and goes on by sequence number,
which a broker that lost the end of its log gives away a second time.
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
TakeMessage = Callable[[Msg], bool | None]
"""Called with each message, in order; returns True when it wants no more. Raises nothing."""

_HEARTBEAT_SECONDS: Final = 1
_SILENCE_SECONDS: Final = 2.5 * _HEARTBEAT_SECONDS
"""A consumer that sent neither a record nor a heartbeat for so long is gone."""
_SUBSCRIBING: Final = 64
"""How many readers subscribe at once: after a restart of the broker all of them want to."""


class _Consumer:
    """What one of the broker's consumers sends, up to where some of it may be missing."""

    def __init__(self, client: Client, take: TakeMessage, caught_up: Callable[[], None]) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """When no more is taken: True if `take` has enough."""
        self.heard_at = math.inf
        """When something came last, by the monotonic clock; before the broker is asked to send, never too long ago."""
        self._client = client
        self._take = take
        self._caught_up = caught_up
        self._delivered = 0
        self._stored = math.inf

    def begin(self, stored: int) -> None:
        """Learn how many records there were when the broker began to send."""
        self.heard_at = time.monotonic()
        self._stored = stored
        if self._delivered >= stored:
            self._caught_up()

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
                elif self._delivered == self._stored:
                    self._caught_up()
            # A heartbeat or a request to say how far the reader is. Records have no headers.
            elif reply := message.reply or message.headers.get(Header.CONSUMER_STALLED):
                await self._client.publish(reply)
            elif message.headers.get(Header.LAST_CONSUMER) != str(self._delivered):
                self.end()
        except Exception as error:  # noqa: BLE001  # nats-py would only log it
            if not self.ended.done():
                self.ended.set_exception(error)

    def end(self) -> None:
        """Say that no more will come: another consumer must go on."""
        if not self.ended.done():
            self.ended.set_result(False)


class Consumers:
    """All of this process's consumers."""

    def __init__(self, stream: str) -> None:
        """`stream` is the name of the stream that is read."""
        self._stream = stream
        self._open: set[_Consumer] = set()
        self._subscribing = asyncio.Semaphore(_SUBSCRIBING)

    async def deliver(
        self,
        client: Client,
        jetstream: JetStreamContext,
        subject: str,
        since: datetime | None,
        take: TakeMessage,
        caught_up: Callable[[], None],
    ) -> bool:
        """Have what was stored from a moment on, or all, taken until it is enough: True; or until some may be missing.

        By time, not by sequence number: those of a stream that was lost, or lost its end, are given away again. What
        was stored in that same moment comes a second time. `caught_up` is called once all that was stored when the
        broker began to send has been taken. Raises NatsError, OSError or TimeoutError when the broker
        does not send.
        """
        address, consumer = client.new_inbox(), _Consumer(client, take, caught_up)
        subscription = await client.subscribe(address, cb=consumer.hear)
        self._open.add(consumer)
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
                info = await answer(jetstream.add_consumer(self._stream, config))
            # The broker may have sent some before it said how many are left.
            sent = info.delivered.consumer_seq if info.delivered else 0
            consumer.begin((info.num_pending or 0) + sent)
            return await consumer.ended
        finally:
            consumer.end()
            self._open.discard(consumer)
            # The broker drops a consumer that nobody listens to.
            with contextlib.suppress(NatsError, OSError):
                await subscription.unsubscribe()

    def end(self) -> None:
        """Tell all readers that no more will come from here."""
        for consumer in self._open:
            consumer.end()

    async def end_silent(self) -> None:
        """Tell the readers whose consumers are gone. One clock for all: a timer for each record costs much more."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS / 2)
            for consumer in self._open:
                if time.monotonic() > consumer.heard_at + _SILENCE_SECONDS:
                    consumer.end()


async def answer(asked: Awaitable[T]) -> T:
    """Return the broker's answer; raises CancelledError when the task was cancelled meanwhile.

    nats-py waits by asyncio.wait_for, which on Python 3.11 forgets a cancel that comes together with the answer.
    """
    task = asyncio.current_task()
    cancels = task.cancelling() if task else 0
    answer = await asked
    if task and task.cancelling() > cancels:
        raise asyncio.CancelledError
    return answer
