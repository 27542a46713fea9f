"""SIGKILL ends the notifier at every step of a delivery: every outcome arrives, and repeats share one id.

`make chaos` kills the notifier 50 times. The ordinary run kills it once at each step.
"""

import asyncio
import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
from google.protobuf.duration_pb2 import Duration

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.deliveries import settled, until
from tests.support.jobs import new_job, watch, webhook
from tests.support.receivers import Receiver, Reply, Request, receiving, status
from tests.support.stacks import running

STEPS = (
    "before",
    "connecting",
    "request sent",
    "answered",
    "a moment later",
    "before the next attempt",
)
KILLS = int(os.environ.get("CHAOS_KILLS", str(len(STEPS))))
QUEUE = "notifications-crash"


class Crashing(NamedTuple):
    stub: LlmServiceStub
    notifier: Process
    receiver: Receiver


@pytest.fixture(scope="module")
async def crashing(stack: Stack) -> AsyncIterator[Crashing]:
    notifier = stack.add("notifier", {"NOTIFIER_TASK_QUEUE": QUEUE})
    gateway = stack.add(
        "gateway",
        {
            "GATEWAY_NOTIFY_QUEUE": QUEUE,
            "GATEWAY_NOTIFY_MAX_INTERVAL": "PT2S",
            "GATEWAY_NOTIFY_MAX_DURATION": "PT10M",
        },
    )
    async with receiving() as receiver, running(stack, notifier, gateway) as stub:
        yield Crashing(stub, notifier, receiver)


def replies(step: str, crashing: Crashing, died: asyncio.Event, chance: random.Random) -> list[Reply]:
    """Return the receiver's replies: one during which the notifier is killed, then one that accepts the event."""

    def kill() -> None:
        crashing.notifier.signal(signal.SIGKILL)
        died.set()

    async def reply(writer: asyncio.StreamWriter, request: Request) -> None:
        match step:
            case "answered":
                await status(200)(writer, request)
            case "a moment later":
                await status(200)(writer, request)
                await asyncio.sleep(chance.uniform(0, 0.02))
            case "before the next attempt":
                await status(503)(writer, request)
                await asyncio.sleep(chance.uniform(0, 0.1))
        kill()

    if step == "connecting":
        crashing.receiver.when_connected(kill)
        return [status(200)]
    if step == "before":
        kill()
        return [status(200)]
    return [reply, status(200)]


@pytest.mark.timeout(120 + 20 * KILLS)
async def test_every_outcome_arrives_although_the_notifier_dies(crashing: Crashing) -> None:
    """Each outcome arrives at least once. A receiver that drops ids that it has seen gets each exactly once."""
    chance = random.Random(0)
    jobs: dict[str, str] = {}
    for number, step in enumerate(itertools.islice(itertools.cycle(STEPS), KILLS)):
        died = asyncio.Event()
        path = f"/{number}"
        url = crashing.receiver.on(path, *replies(step, crashing, died, chance))
        job = new_job(params={"max_tokens": 50}, notify=webhook(url))
        submitted = await crashing.stub.Submit(llm_pb2.SubmitRequest(job=job))
        jobs[submitted.workflow_id] = path
        async with asyncio.timeout(30):
            await died.wait()
        assert await crashing.notifier.wait() == -signal.SIGKILL, step
        await crashing.notifier.start()
        await crashing.notifier.wait_ready()

    came = Counter[str]()
    for id_, path in jobs.items():
        assert (await watch(crashing.stub, id_)).final.status.state == llm_pb2.JOB_STATE_SUCCEEDED
        (entry,) = await until(crashing.stub, id_, settled)
        assert entry.state == llm_pb2.NOTIFY_STATE_DELIVERED
        requests = crashing.receiver.so_far(path)
        assert {request.headers["webhook-id"] for request in requests} == {entry.id}
        assert {request.event["subject"] for request in requests} == {id_}
        assert len({request.body for request in requests}) == 1
        came[entry.id] += len(requests)
    assert len(came) == KILLS, "two outcomes share an id"
    assert came.total() > KILLS, "no kill came after the receiver had accepted the event"


async def test_another_notifier_goes_on_telling_of_progress(crashing: Crashing) -> None:
    """It continues after the heartbeat timeout of the killed notifier, and sends no event a second time."""
    url = crashing.receiver.on("/progress", status(200))
    options = llm_pb2.NotifyOptions(
        events=[llm_pb2.NOTIFY_EVENT_STARTED, llm_pb2.NOTIFY_EVENT_PROGRESS], progress_interval=Duration(seconds=1)
    )
    job = new_job(params={"max_tokens": 8000}, notify=webhook(url), notify_options=options)
    id_ = (await crashing.stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    before = len(await crashing.receiver.received("/progress", 4))
    crashing.notifier.signal(signal.SIGKILL)
    await crashing.notifier.wait()
    await crashing.notifier.start()
    requests = await crashing.receiver.received("/progress", before + 3)
    await crashing.stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await watch(crashing.stub, id_)
    kinds = [request.event["type"].rpartition(".")[2] for request in requests]
    assert kinds == ["started"] + ["progress"] * (len(kinds) - 1)
    tokens = [int(r.event["data"]["status"]["progress"].get("outputTokens", 0)) for r in requests[1:]]
    assert tokens == sorted(tokens)
    log = (await crashing.stub.ListDeliveries(llm_pb2.ListDeliveriesRequest(workflow_id=id_))).deliveries
    assert [(entry.type, entry.state) for entry in log] == [
        ("llm.v1.job.started", llm_pb2.NOTIFY_STATE_DELIVERED),
        ("llm.v1.job.progress", llm_pb2.NOTIFY_STATE_DELIVERED),
    ]
