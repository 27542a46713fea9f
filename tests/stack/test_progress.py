"""How progress is told by a notifier with narrow bounds, and by one that was stopped and started again."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs import names
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.jobs import new_job, run_job, until_output, webhook
from tests.support.receivers import Receiver, hang, receiving, status
from tests.support.stacks import running

QUEUE = "notifications-progress"
LONG = {"max_tokens": 8000}


class Narrow(NamedTuple):
    """A gateway whose notifier tells of three jobs at once, two of a user."""

    stub: LlmServiceStub
    notifier: Process
    receiver: Receiver


@pytest.fixture(scope="module")
async def narrow(stack: Stack) -> AsyncIterator[Narrow]:
    notifier = stack.add(
        "notifier",
        {
            "NOTIFIER_TASK_QUEUE": QUEUE,
            "NOTIFIER_MAX_PROGRESS": "3",
            "NOTIFIER_MAX_PROGRESS_PER_USER": "2",
            "NOTIFIER_SHUTDOWN_GRACE": "PT0S",
        },
    )
    gateway = stack.add("gateway", {"GATEWAY_NOTIFY_QUEUE": QUEUE})
    async with receiving() as receiver, running(stack, notifier, gateway) as stub:
        yield Narrow(stub, notifier, receiver)


def told_job(narrow: Narrow, path: str, seconds: int = 1, **changes: Any) -> llm_pb2.JobRequest:
    options = llm_pb2.NotifyOptions(
        events=[llm_pb2.NOTIFY_EVENT_STARTED, llm_pb2.NOTIFY_EVENT_PROGRESS],
        progress_interval=Duration(seconds=seconds),
    )
    values = {"params": LONG, "notify": webhook(f"{narrow.receiver.url}{path}"), "notify_options": options}
    return new_job(**{**values, **changes})


async def submit(narrow: Narrow, job: llm_pb2.JobRequest) -> str:
    return (await narrow.stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id


async def test_a_users_slow_receivers_leave_room_for_the_progress_of_others(narrow: Narrow) -> None:
    """What is too much of one user's is told later, once there is room; its jobs do not wait for that."""
    paths = [f"/greedy/{number}" for number in range(3)]
    for path in paths:
        narrow.receiver.on(path, hang)
    jobs = {path: await submit(narrow, told_job(narrow, path, user_id="greedy")) for path in paths}
    for id_ in jobs.values():
        await until_output(narrow.stub, id_)
    modest = await submit(narrow, told_job(narrow, "/modest", user_id="modest"))
    await narrow.receiver.received("/modest", 3)
    told = [path for path in paths if narrow.receiver.so_far(path)]
    assert len(told) == 2
    (waits,) = set(paths) - set(told)
    async with asyncio.timeout(60):
        short = await run_job(narrow.stub, told_job(narrow, "/short", user_id="greedy", params={"max_tokens": 100}))
    assert short.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert not narrow.receiver.so_far("/short")
    await narrow.stub.Cancel(llm_pb2.CancelRequest(workflow_id=jobs[told[0]]))
    await narrow.receiver.received(waits)
    for id_ in (modest, *jobs.values()):
        await narrow.stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


async def test_a_notifier_that_takes_over_keeps_the_interval(narrow: Narrow, temporal: Client) -> None:
    """The one before it stopped a moment after it had told."""
    interval = timedelta(seconds=6)
    narrow.receiver.on("/over", status(200))
    id_ = await submit(narrow, told_job(narrow, "/over", seconds=6))
    await narrow.receiver.received("/over", 2)
    async with asyncio.timeout(60):
        while "llm.v1.job.progress" not in [item.type for item in await heartbeat(temporal, id_)]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await narrow.notifier.terminate()
    await narrow.notifier.start()
    requests = await narrow.receiver.received("/over", 4)
    await narrow.stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    kinds = [request.event["type"].rpartition(".")[2] for request in requests]
    assert kinds == ["started", *["progress"] * (len(kinds) - 1)]
    sent = [int(request.headers["webhook-timestamp"]) for request in requests[1:]]
    # The header has whole seconds.
    assert all(later - earlier >= interval.total_seconds() - 1 for earlier, later in itertools.pairwise(sent))


async def heartbeat(temporal: Client, workflow_id: str) -> list[llm_pb2.Delivery]:
    """Return what a notifier would go on from."""
    described = await temporal.get_workflow_handle(workflow_id).describe()
    for activity in described.raw_description.pending_activities:
        if activity.activity_type.name == names.ACTIVITY_NOTIFY_PROGRESS and activity.heartbeat_details.payloads:
            (details,) = await data_converter.decode(
                activity.heartbeat_details.payloads, [llm_pb2.NotifyProgressResponse]
            )
            return list(details.deliveries)
    return []
