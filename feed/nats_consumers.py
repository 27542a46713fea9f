"""How the live feed is read from NATS JetStream: each reader has a push consumer of its own.

The ordered consumer of nats-py is not used. It looks for its server only every ten seconds, and goes on by sequence
number. A broker that has lost the end of its log gives the same number to another message.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, TypeVar

from nats.errors import Error as NatsError
from nats.errors import NotJSMessageError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, Header

from runtime.nats_client import DirectClient

T = TypeVar("T")


class Position(NamedTuple):
    """A message's place in the stream. A broker that has lost the stream's end gives its sequence numbers again."""

    stored_at: int
    """Time at which the broker stored it, in nanoseconds since the epoch."""
    sequence: int


MessageHandler = Callable[[Position, bytes], bool | None]
"""Called with each message's place and data, in order. Returns True when it has enough. Must not raise."""

_HEARTBEAT_SECONDS: Final = 1
_SILENCE_SECONDS: Final = 2.5 * _HEARTBEAT_SECONDS
"""A consumer that has sent neither a message nor a heartbeat for so long is gone."""
_FIELDS: Final = 9
"""Number of fields of a message's reply subject in its older form."""
_MAX_SUBSCRIBING: Final = 64
"""Maximum number of readers that subscribe concurrently. After a restart of the broker all of them do."""


class _Consumer:
    """One of the broker's consumers. It delivers messages until one may have been missed."""

    def __init__(self, client: DirectClient, on_message: MessageHandler, caught_up: Callable[[], None]) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Done when no more is delivered: True if `on_message` has enough, False if a message may have been missed."""
        self.heard_at = math.inf
        """When the broker last sent something, by the monotonic clock. Infinite until it begins to send."""
        self._client = client
        self._on_message = on_message
        self._caught_up = caught_up
        self._delivered = 0
        self._stored = math.inf

    def begin(self, stored: int) -> None:
        """Note how many messages were stored when the broker began to send."""
        self.heard_at = time.monotonic()
        self._stored = stored
        if self._delivered >= stored:
            self._caught_up()

    async def hear(self, reply: str, data: bytes, headers: Mapping[str, str] | None) -> None:
        """Handle a message, a heartbeat or a flow control request of the broker's."""
        self.heard_at = time.monotonic()
        if self.ended.done():
            return
        try:
            if headers is None:
                self._delivered += 1
                number, position = _delivery(reply)
                if number != self._delivered:
                    self.end()
                elif self._on_message(position, data):
                    self.ended.set_result(True)
                elif self._delivered == self._stored:
                    self._caught_up()
            # Records have no headers. This is a heartbeat or a flow control request.
            elif request := reply or headers.get(Header.CONSUMER_STALLED):
                await self._client.publish(request)
            elif headers.get(Header.LAST_CONSUMER) != str(self._delivered):
                self.end()
            # Nothing is left to be sent: some that were stored have been removed meanwhile.
            elif self._delivered < self._stored < math.inf:
                self._stored = self._delivered
                self._caught_up()
        except Exception as error:  # noqa: BLE001  # it would end the connection's reader
            if not self.ended.done():
                self.ended.set_exception(error)

    def end(self) -> None:
        """End the delivery: another consumer must go on."""
        if not self.ended.done():
            self.ended.set_result(False)


class Consumers:
    """All of this process's consumers."""

    def __init__(self, stream: str) -> None:
        """`stream` is the name of the stream that they read."""
        self._stream = stream
        self._open: set[_Consumer] = set()
        self._subscribing = asyncio.Semaphore(_MAX_SUBSCRIBING)

    async def deliver(
        self,
        client: DirectClient,
        jetstream: JetStreamContext,
        subject: str,
        since: Position | None,
        on_message: MessageHandler,
        caught_up: Callable[[], None],
    ) -> bool:
        """Deliver messages to `on_message`, from `since` on or from the first one stored.

        Returns True once `on_message` has enough, False as soon as a message may have been missed. Messages that were
        stored at `since` exactly are delivered again. Calls `caught_up` once all messages have been delivered that were
        stored when the broker began to send. Raises NatsError, OSError or TimeoutError when the broker does not send.

        It starts by time and not by sequence number, for a stream that was lost, or lost its end, gives the same
        numbers to other messages.
        """
        address, consumer = client.new_inbox(), _Consumer(client, on_message, caught_up)
        subscription = await client.subscribe_directly(address, consumer.hear)
        self._open.add(consumer)
        try:
            async with self._subscribing:
                config = ConsumerConfig(
                    filter_subject=subject,
                    deliver_subject=address,
                    deliver_policy=DeliverPolicy.ALL if since is None else DeliverPolicy.BY_START_TIME,
                    opt_start_time=since and _before(since.stored_at),
                    ack_policy=AckPolicy.NONE,
                    max_deliver=1,
                    num_replicas=1,
                    mem_storage=True,
                    flow_control=True,
                    idle_heartbeat=_HEARTBEAT_SECONDS,
                )
                info = await reraise_cancel(jetstream.add_consumer(self._stream, config))
            # The broker may have sent some before it answered how many are left.
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
        """End the delivery to all readers."""
        for consumer in self._open:
            consumer.end()

    async def end_silent(self) -> None:
        """End the delivery of consumers that are gone. A timer for each message would cost much more."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS / 2)
            for consumer in self._open:
                if time.monotonic() > consumer.heard_at + _SILENCE_SECONDS:
                    consumer.end()


def _delivery(reply: str) -> tuple[int, Position]:
    """Return the number of a message among those that its consumer was sent, and its place in the stream.

    nats-py's Msg.metadata takes six times as long. Raises NotJSMessageError for a message of somebody else.
    """
    # $JS.ACK.<stream>.<consumer>.<times delivered>.<number in stream>.<number of consumer>.<nanoseconds>.<pending>
    fields = reply.split(".")
    try:
        # A newer form names the domain and the account before the stream.
        stream, consumer, nanoseconds = map(int, fields[5:8] if len(fields) == _FIELDS else fields[7:10])
    except ValueError:
        raise NotJSMessageError from None
    return consumer, Position(nanoseconds, stream)


def _before(nanoseconds: int) -> datetime:
    """Return a time shortly before. The broker is asked in microseconds."""
    return datetime.fromtimestamp(nanoseconds // 1_000_000 / 1000, UTC) - timedelta(milliseconds=1)


async def reraise_cancel(request: Awaitable[T]) -> T:
    """Return the broker's answer. Raises CancelledError when the task was cancelled meanwhile.

    nats-py waits by asyncio.wait_for, which on Python 3.11 swallows a cancel that comes together with the answer.
    """
    task = asyncio.current_task()
    cancels = task.cancelling() if task else 0
    answer = await request
    if task and task.cancelling() > cancels:
        raise asyncio.CancelledError
    return answer
