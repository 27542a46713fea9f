"""Events on a Kafka topic, by the CloudEvents binding in structured mode; the only module that imports aiokafka."""

import asyncio
import contextlib
import json
import ssl
from typing import Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    BrokerResponseError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RequestTimedOutError,
)

from jobs.errors import DeliveryFailed, DeliveryRefused
from llm_pb import llm_pb2
from runtime.telemetry import current_headers
from services.notifier.event import CloudEvent
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.sink import CONTENT_TYPE, Answer

_MECHANISM: Final = "SCRAM-SHA-512"


class KafkaSink:
    """A Sink for NotifyTarget.kafka, with one producer for each topic, so that a topic that fails delays no other.

    A producer connects with the first delivery. After a failure the next delivery creates a new one: a record that an
    idempotent producer has lost leaves a gap in its sequence, after which the broker accepts nothing more from it.
    """

    def __init__(self, settings: NotifierSettings) -> None:
        """`settings.kafka_servers` must be set."""
        self._settings = settings
        self._timeout = settings.broker_timeout.total_seconds()
        self._producers: dict[str, asyncio.Task[AIOKafkaProducer]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def destination(self, target: llm_pb2.NotifyTarget) -> str:
        """See Sink. It is the topic, because its partitions may be unavailable while others are not."""
        return f"kafka:{target.kafka.topic}"

    async def deliver(self, target: llm_pb2.NotifyTarget, event: CloudEvent, user_id: str, tenant: str = "") -> Answer:
        """Send the event, and wait until all in-sync replicas have it. The key is the job's workflow id."""
        topic = target.kafka.topic
        if topic not in self._settings.kafka_topics:
            raise DeliveryRefused(f"the operator allows no events on the topic {topic}")
        starting = self._producers.get(topic)
        if starting is None:
            starting = self._producers[topic] = asyncio.create_task(self._start())
        body = json.dumps(event, ensure_ascii=False).encode()
        headers = {"content-type": CONTENT_TYPE, **current_headers()}
        try:
            async with asyncio.timeout(self._timeout):
                producer = await asyncio.shield(starting)
                await producer.send_and_wait(
                    topic,
                    body,
                    key=event["subject"].encode(),
                    headers=[(name, value.encode()) for name, value in headers.items()],
                )
        except (KafkaError, OSError, TimeoutError) as error:
            self._drop(topic, starting)
            if isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError)):
                raise DeliveryRefused(f"the event of {len(body)} bytes is larger than Kafka accepts") from error
            raise DeliveryFailed(self._failure(error)) from error
        return Answer()

    def _failure(self, error: KafkaError | OSError | TimeoutError) -> str:
        """Return what the error means. The text of most errors names the operator's servers, so it is not in it."""
        if isinstance(error, (TimeoutError, KafkaTimeoutError, RequestTimedOutError)):
            return f"Kafka did not acknowledge the event within {self._timeout:g} s"
        if isinstance(error, (AuthenticationFailedError, AuthenticationMethodNotSupported)):
            return "Kafka refused the login of the notifier"
        if isinstance(error, BrokerResponseError) and error.description:
            return f"Kafka did not accept the event: {error.description}"
        return "Kafka cannot be reached"

    async def close(self) -> None:
        """See Sink."""
        for topic, starting in list(self._producers.items()):
            self._drop(topic, starting)
        await asyncio.gather(*self._ending)

    async def _start(self) -> AIOKafkaProducer:
        settings, tls, user = self._settings, self._settings.kafka_tls, self._settings.kafka_user
        password = settings.kafka_password
        producer = AIOKafkaProducer(
            bootstrap_servers=settings.kafka_servers,
            client_id="durable-llm-notifier",
            enable_idempotence=True,
            request_timeout_ms=int(self._timeout * 1000),
            security_protocol=f"SASL_{'SSL' if tls else 'PLAINTEXT'}" if user else "SSL" if tls else "PLAINTEXT",
            ssl_context=ssl.create_default_context() if tls else None,
            sasl_mechanism=_MECHANISM,
            sasl_plain_username=user,
            sasl_plain_password=password.get_secret_value() if password else None,
        )
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer

    def _drop(self, topic: str, starting: asyncio.Task[AIOKafkaProducer]) -> None:
        """Remove a producer, and stop it in the background. It still sends what it can."""
        if self._producers.get(topic) is starting:
            del self._producers[topic]
            ending = asyncio.create_task(_stop(starting))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


async def _stop(starting: asyncio.Task[AIOKafkaProducer]) -> None:
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError, KafkaError, OSError):
        await (await starting).stop()
