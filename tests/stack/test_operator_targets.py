"""Deliveries to targets of the operator's settings: brokers, and endpoints for jobs that name no target.

NATS is a real server. Kafka is a peer that speaks Kafka's protocol.
"""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc
import nats
import pytest
from standardwebhooks import Webhook

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.notifier.event import CloudEvent
from tests.support.batches import Stubs, create
from tests.support.jobs import new_job, run_job, unpack
from tests.support.peers import KafkaPeer, NatsPeer, kafka_peer, secret
from tests.support.receivers import Receiver, receiving
from tests.support.stacks import FAST, running, stack_settings

QUEUE = "notifications-operator"
USER = "user-with-an-endpoint"
BATCHES = "user-of-batches"
OWN = secret("own").get_secret_value()


class Brokers(NamedTuple):
    """A gateway whose notifier has both brokers, and endpoints for jobs that name no target."""

    notifier: Process
    stub: LlmServiceStub
    address: str
    nats: NatsPeer
    kafka: KafkaPeer
    receiver: Receiver


@pytest.fixture(scope="module")
async def brokers(stack: Stack) -> AsyncIterator[Brokers]:
    nats_peer = NatsPeer(stack)
    await nats_peer.start()
    client = await nats.connect(nats_peer.url)
    await client.jetstream().add_stream(name="SMALL", subjects=["llm.events.small"], max_msg_size=100)
    await client.close()
    async with kafka_peer() as kafka, receiving() as receiver:
        notifier = stack.add(
            "notifier",
            {
                "NOTIFIER_TASK_QUEUE": QUEUE,
                "NOTIFIER_NATS_URL": nats_peer.url,
                "NOTIFIER_KAFKA_SERVERS": kafka.address,
                "NOTIFIER_KAFKA_TOPICS": '["jobs"]',
                "NOTIFIER_DEFAULT_WEBHOOK_URL": f"{receiver.url}/default",
                "NOTIFIER_USERS": json.dumps(
                    {
                        USER: {"url": f"{receiver.url}/own", "secrets": [OWN]},
                        BATCHES: {"url": f"{receiver.url}/batches"},
                    }
                ),
                "NOTIFIER_JOB_URL": "https://llm.example.com/jobs/{workflow_id}",
            },
        )
        gateway = stack.add("gateway", {"GATEWAY_NOTIFY_QUEUE": QUEUE, "GATEWAY_NOTIFY_OPERATOR": "true"})
        async with running(stack, notifier, gateway) as stub:
            yield Brokers(notifier, stub, stack.address(gateway.name), nats_peer, kafka, receiver)


def expect(event: CloudEvent, final: llm_pb2.StreamStatusResponse, place: int) -> None:
    status = final.status
    assert event["specversion"] == "1.0"
    assert event["id"] == f"{status.run_id}-finished-{place}"
    assert event["type"] == "llm.v1.job.succeeded"
    assert event["subject"] == status.workflow_id
    assert event["data"]["status"]["state"] == "JOB_STATE_SUCCEEDED"
    assert event["data"]["result"]["metadata"]["outputTokens"] == str(final.result.metadata.output_tokens)
    assert status.notifications[place].state == llm_pb2.NOTIFY_STATE_DELIVERED


async def test_the_end_of_a_batch_that_names_no_target_is_told_to_an_endpoint_of_the_settings(
    brokers: Brokers,
) -> None:
    async with grpc.aio.insecure_channel(brokers.address) as channel:
        stubs = Stubs(FileServiceStub(channel), BatchServiceStub(channel))
        ended = await stubs.end((await create(stubs, b"{}\n", BATCHES)).batch_id)
    (request,) = await brokers.receiver.received("/batches")
    assert (request.event["type"], request.event["subject"]) == ("llm.v1.batch.failed", ended.batch_id)
    assert [shown.state for shown in ended.notifications] == [llm_pb2.NOTIFY_STATE_DELIVERED]


async def test_a_jobs_end_arrives_at_both_brokers(brokers: Brokers) -> None:
    """Both get the same CloudEvent. Kafka's key is the workflow id, and NATS drops repeats by the event's id."""
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
    ("user", "path", "secrets"),
    [
        (USER, "/own", [OWN]),
        ("user-without", "/default", json.loads(FAST["notifier"]["NOTIFIER_WEBHOOK_SECRETS"])),
    ],
    ids=["the user's", "the default"],
)
async def test_a_job_that_names_no_target_is_told_to_an_endpoint_of_the_settings(
    brokers: Brokers, user: str, path: str, secrets: list[str]
) -> None:
    """The event is signed with each secret and links to the job. The job's user does not see the endpoint's path."""
    seen = await run_job(brokers.stub, new_job(user_id=user, params={"max_tokens": 5}))
    (request,) = await brokers.receiver.received(path)
    expect(request.event, seen.final, 0)
    id_ = seen.final.status.workflow_id
    assert request.event["data"]["links"] == {"job": f"https://llm.example.com/jobs/{id_}"}
    assert len(request.headers["webhook-signature"].split()) == len(secrets)
    for one in secrets:
        Webhook(one).verify(request.body, request.headers)
    assert [shown.target for shown in seen.final.status.notifications] == [brokers.receiver.url]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject="small")), "larger than NATS accepts"),
        (llm_pb2.NotifyTarget(kafka=llm_pb2.KafkaTopic(topic="other")), "allows no events on the topic other"),
    ],
    ids=["too large", "topic"],
)
async def test_what_a_broker_never_takes_is_not_tried_again(
    brokers: Brokers, target: llm_pb2.NotifyTarget, says: str
) -> None:
    """There is one attempt, and the delivery log has the reason."""
    seen = await run_job(brokers.stub, new_job(params={"max_tokens": 5}, notify=[target]))
    request = llm_pb2.ListDeliveriesRequest(workflow_id=seen.final.status.workflow_id)
    (entry,) = (await brokers.stub.ListDeliveries(request)).deliveries
    assert entry.state == llm_pb2.NOTIFY_STATE_FAILED
    (attempt,) = entry.attempts
    assert unpack(attempt.error)["ErrorInfo"].reason == "DELIVERY_REFUSED"
    assert says in attempt.error.message


async def test_a_notifier_with_an_endpoint_names_the_setting_that_gateways_need(brokers: Brokers, stack: Stack) -> None:
    assert "GATEWAY_NOTIFY_OPERATOR=true" in brokers.notifier.log
    assert "GATEWAY_NOTIFY_OPERATOR" not in stack.processes["notifier"].log


async def test_the_stack_notifies_an_endpoint_that_only_its_notifier_knows(tmp_path: Path) -> None:
    """The local stack sets GATEWAY_NOTIFY_OPERATOR where its notifier has an endpoint for jobs that name no target."""
    async with receiving() as receiver:
        environment = {
            **FAST,
            "notifier": {**FAST["notifier"], "NOTIFIER_DEFAULT_WEBHOOK_URL": f"{receiver.url}/default"},
        }
        async with (
            Stack(stack_settings(tmp_path / "stack"), environment=environment) as stack,
            grpc.aio.insecure_channel(stack.address("gateway")) as channel,
        ):
            seen = await run_job(LlmServiceStub(channel), new_job(params={"max_tokens": 5}))
            (request,) = await receiver.received("/default")
    assert request.event["subject"] == seen.final.status.workflow_id
    (notification,) = seen.final.status.notifications
    assert notification.state == llm_pb2.NOTIFY_STATE_DELIVERED
