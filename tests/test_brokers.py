"""Jobs whose outcome goes to brokers: submitted by gRPC, told to a real NATS server and a peer of Kafka's protocol."""

from collections.abc import AsyncIterator
from typing import NamedTuple

import grpc
import nats
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.notifier.event import CloudEvent
from tests.conftest import new_job, run_job, unpack
from tests.test_sinks import KafkaPeer, NatsPeer, kafka_peer

QUEUE = "notifications-brokers"


class Brokers(NamedTuple):
    """A gateway whose notifier knows both."""

    stub: LlmServiceStub
    nats: NatsPeer
    kafka: KafkaPeer


@pytest.fixture(scope="module")
async def brokers(stack: Stack) -> AsyncIterator[Brokers]:
    nats_peer = NatsPeer(stack)
    await nats_peer.start()
    client = await nats.connect(nats_peer.url)
    await client.jetstream().add_stream(name="SMALL", subjects=["llm.events.small"], max_msg_size=100)
    await client.close()
    async with kafka_peer() as kafka:
        notifier = stack.add(
            "notifier",
            {
                "NOTIFIER_TASK_QUEUE": QUEUE,
                "NOTIFIER_NATS_URL": nats_peer.url,
                "NOTIFIER_KAFKA_SERVERS": kafka.address,
                "NOTIFIER_KAFKA_TOPICS": '["jobs"]',
            },
        )
        gateway = stack.add("gateway", {"GATEWAY_NOTIFY_QUEUE": QUEUE})
        for process in (notifier, gateway):
            await process.start()
            await process.wait_ready()
        async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
            yield Brokers(LlmServiceStub(channel), nats_peer, kafka)
        for process in (gateway, notifier):
            await process.terminate()


def expect(event: CloudEvent, final: llm_pb2.StreamStatusResponse, place: int) -> None:
    status = final.status
    assert event["specversion"] == "1.0"
    assert event["id"] == f"{status.run_id}-finished-{place}"
    assert event["type"] == "llm.v1.job.succeeded"
    assert event["subject"] == status.workflow_id
    assert event["data"]["status"]["state"] == "JOB_STATE_SUCCEEDED"
    assert event["data"]["result"]["metadata"]["outputTokens"] == str(final.result.metadata.output_tokens)
    assert status.notifications[place].state == llm_pb2.NOTIFY_STATE_DELIVERED


async def test_a_jobs_end_arrives_at_both_brokers(brokers: Brokers) -> None:
    """As the same CloudEvent; Kafka's key is the workflow id, NATS has the event's id to drop repeats by."""
    targets = [brokers.nats.target("jobs"), brokers.kafka.target("jobs")]
    seen = await run_job(brokers.stub, new_job(params={"max_tokens": 5}, notify=targets))
    assert [shown.target for shown in seen.final.status.notifications] == ["nats:taken.jobs", "kafka:jobs"]
    (published,) = await brokers.nats.taken("jobs", 1)
    expect(published.event, seen.final, 0)
    assert published.id == published.event["id"]
    (produced,) = await brokers.kafka.taken("jobs", 1)
    expect(produced.event, seen.final, 1)
    assert produced.key == seen.final.status.workflow_id
    assert {**published.event, "id": produced.id} == produced.event


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject="small")), "larger than NATS takes"),
        (llm_pb2.NotifyTarget(kafka=llm_pb2.KafkaTopic(topic="other")), "allows no events on the topic other"),
    ],
    ids=["too large", "topic"],
)
async def test_what_a_broker_never_takes_is_not_tried_again(
    brokers: Brokers, target: llm_pb2.NotifyTarget, says: str
) -> None:
    """One attempt, and the log says why."""
    seen = await run_job(brokers.stub, new_job(params={"max_tokens": 5}, notify=[target]))
    request = llm_pb2.ListDeliveriesRequest(workflow_id=seen.final.status.workflow_id)
    (entry,) = (await brokers.stub.ListDeliveries(request)).deliveries
    assert entry.state == llm_pb2.NOTIFY_STATE_FAILED
    (attempt,) = entry.attempts
    assert unpack(attempt.error)["ErrorInfo"].reason == "DELIVERY_REFUSED"
    assert says in attempt.error.message
