"""Receivers of deliveries: one real server for each kind of target."""

import asyncio
import base64
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import nats
import pytest
from pydantic import SecretStr

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from services.notifier.event import CloudEvent
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.sink import CONTENT_TYPE
from tests.support.jobs import webhook
from tests.support.postgres_server import PostgresServer
from tests.support.receivers import Receiver, hang, status

SHORT = timedelta(seconds=1)

LOOPBACK: dict[str, Any] = {
    "webhook_networks": (ip_network("127.0.0.0/8"),),
    "webhook_schemes": ("http",),
    "webhook_ports": (),
    "webhook_timeout": SHORT,
    "broker_timeout": SHORT,
}


class Taken(NamedTuple):
    """An event that a receiver got."""

    id: str
    content_type: str
    event: CloudEvent
    headers: Mapping[str, str]
    key: str = ""


class Peer(Protocol):
    """A receiver for one kind of target."""

    kind: str
    settings: NotifierSettings
    drops_repeats: bool
    """True if the receiver itself drops a second event with the same id."""
    keyed: bool
    """True if an event has the job's id as its key."""
    bounded: bool
    """True if the receiver refuses an event of more than 1 MiB."""

    def target(self, name: str) -> llm_pb2.NotifyTarget:
        """Return a target of this receiver."""
        ...

    def refused(self) -> llm_pb2.NotifyTarget | None:
        """Return a target that the operator does not allow, or None if this kind has no such target."""
        ...

    async def taken(self, name: str, count: int) -> list[Taken]:
        """Return the target's events once there are `count`."""
        ...

    def fall_silent(self) -> None:
        """Stop answering."""
        ...

    def resume(self) -> None:
        """Answer again."""
        ...


def until_stopped(pid: int) -> None:
    """Return once a process that was sent SIGSTOP has stopped, which takes a moment on a busy machine."""
    while "(stopped)" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.001)


class WebhookPeer:
    """An HTTP server."""

    kind = "webhook"
    drops_repeats = False
    keyed = False
    bounded = False

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.settings = NotifierSettings(**LOOPBACK)
        self._silent = False

    def target(self, name: str) -> llm_pb2.NotifyTarget:
        (target,) = webhook(self._receiver.on(f"/{name}", hang if self._silent else status(200)))
        return target

    def refused(self) -> llm_pb2.NotifyTarget:
        (target,) = webhook("http://10.0.0.1/")
        return target

    async def taken(self, name: str, count: int) -> list[Taken]:
        requests = await self._receiver.received(f"/{name}", count)
        return [Taken(r.headers["webhook-id"], r.headers["content-type"], r.event, r.headers) for r in requests]

    def fall_silent(self) -> None:
        self._silent = True

    def resume(self) -> None:
        self._silent = False


class NatsPeer:
    """A NATS server with a stream."""

    kind = "nats"
    drops_repeats = True
    keyed = False
    bounded = True

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.url = f"nats://{stack.address('nats')}"
        self.settings = NotifierSettings(nats_url=SecretStr(self.url), **LOOPBACK)

    async def start(self) -> None:
        client = await nats.connect(self.url)
        await client.jetstream().add_stream(name="EVENTS", subjects=["llm.events.taken.>"])
        await client.close()

    def target(self, name: str) -> llm_pb2.NotifyTarget:
        return llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject=f"taken.{name}"))

    def refused(self) -> llm_pb2.NotifyTarget | None:
        return None

    async def taken(self, name: str, count: int) -> list[Taken]:
        client = await nats.connect(self.url)
        subscription = await client.jetstream().subscribe(f"llm.events.taken.{name}", ordered_consumer=True)
        messages = [await subscription.next_msg(timeout=60) for _ in range(count)]
        await client.close()
        return [
            Taken(m.headers["Nats-Msg-Id"], m.headers["content-type"], json.loads(m.data), m.headers) for m in messages
        ]

    def fall_silent(self) -> None:
        nats = self._stack.processes["nats"]
        nats.signal(signal.SIGSTOP)
        until_stopped(nats.pid)

    def resume(self) -> None:
        self._stack.processes["nats"].signal(signal.SIGCONT)


class KafkaPeer:
    """A Kafka broker."""

    kind = "kafka"
    drops_repeats = False
    keyed = True
    bounded = True
    topics = ("whole", "repeat", "many", "silent", "cancelled", "large", "numbered", "traced", "jobs")

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address
        self.settings = NotifierSettings(kafka_servers=address, kafka_topics=self.topics, **LOOPBACK)

    def target(self, name: str) -> llm_pb2.NotifyTarget:
        return llm_pb2.NotifyTarget(kafka=llm_pb2.KafkaTopic(topic=name))

    def refused(self) -> llm_pb2.NotifyTarget:
        return self.target("other")

    async def taken(self, name: str, count: int) -> list[Taken]:
        return await asyncio.to_thread(self._consume, name, count)

    async def batches(self, topic: str, count: int) -> list[Any]:
        """Return `count` record batches of one job as the broker stores them, which is as the client sent them."""
        from aiokafka.client import AIOKafkaClient
        from aiokafka.protocol.fetch import FetchRequest
        from aiokafka.record.memory_records import MemoryRecords

        client = AIOKafkaClient(bootstrap_servers=self.address)
        await client.bootstrap()
        (broker,) = client.cluster.brokers()
        await client.add_topic(topic)
        batches = []
        for offset in range(count):
            partitions = [(number, offset, 2**20) for number in client.cluster.partitions_for_topic(topic)]
            answer = await client.send(broker.nodeId, FetchRequest(100, 1, 2**20, 0, [(topic, partitions)]))
            for _, answers in answer.topics:
                batches += [MemoryRecords(data).next_batch() for *_, data in answers if data]
        await client.close()
        return batches

    def _consume(self, topic: str, count: int) -> list[Taken]:
        from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

        consumer = Consumer({"bootstrap.servers": self.address, "group.id": "test"})
        partitions = consumer.list_topics(topic, timeout=60).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        taken = []
        for message in consumer.consume(count, timeout=20):
            assert message.error() is None
            event = json.loads(message.value())
            headers = {name: value.decode() for name, value in message.headers()}
            taken.append(Taken(event["id"], headers["content-type"], event, headers, message.key().decode()))
        consumer.close()
        return taken

    def fall_silent(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        until_stopped(self._process.pid)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def kafka_peer() -> AsyncIterator[KafkaPeer]:
    pytest.importorskip("aiokafka")
    pytest.importorskip("confluent_kafka")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.kafka_cluster"), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield KafkaPeer(process, (await process.stdout.readline()).decode().strip())
    finally:
        process.kill()
        await process.wait()


class PostgresPeer:
    """A PostgreSQL server."""

    kind = "postgres"
    drops_repeats = True
    keyed = True
    bounded = False
    tables = ("whole", "repeat", "many", "silent", "cancelled", "large", "traced", "jobs")

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.settings = NotifierSettings(
            postgres_url=SecretStr(server.url), postgres_tables=self.tables, **{**LOOPBACK, "broker_timeout": 2 * SHORT}
        )

    def target(self, name: str) -> llm_pb2.NotifyTarget:
        return llm_pb2.NotifyTarget(postgres=llm_pb2.PostgresTable(table=name))

    def refused(self) -> llm_pb2.NotifyTarget:
        return self.target("other")

    async def taken(self, name: str, count: int) -> list[Taken]:
        rows = await self.server.query(f'SELECT * FROM "{name}" ORDER BY updated_at')
        assert len(rows) == count
        return [
            Taken(
                row["event_id"], CONTENT_TYPE, json.loads(row["event"]), {"traceparent": row["traceparent"]}, row["id"]
            )
            for row in rows
        ]

    def fall_silent(self) -> None:
        self.server.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.server.signal(signal.SIGCONT)


PEERS = ("webhook", "nats", "kafka", "postgres")
"""Every kind of target, by its field in NotifyTarget. tests.contract.test_sinks starts a receiver of each."""


def secret(text: str) -> SecretStr:
    return SecretStr("whsec_" + base64.b64encode(text.ljust(24, ".").encode()).decode())
