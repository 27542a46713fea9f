"""Progress notifications of a notifier with low limits, and of one that is stopped and started again."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs import names
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.jobs import new_job, run_job, until_output, watch, webhook
from tests.support.receivers import Receiver, hang, receiving, status
from tests.support.stacks import running

QUEUE = "notifications-progress"
LONG = {"max_tokens": 8000}


class Narrow(NamedTuple):
    """A gateway whose notifier reports progress of at most three jobs at a time, two for each user."""

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
    """Progress over a user's limit is notified later, once there is room. The user's jobs do not wait for it."""
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
    """The earlier notifier stopped a moment after it had sent progress."""
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
    # The header's timestamp has whole seconds.
    assert all(later - earlier >= interval.total_seconds() - 1 for earlier, later in itertools.pairwise(sent))


async def heartbeat(temporal: Client, workflow_id: str) -> list[llm_pb2.Delivery]:
    """Return the deliveries of the heartbeat from which a notifier would continue."""
    described = await temporal.get_workflow_handle(workflow_id).describe()
    for activity in described.raw_description.pending_activities:
        if activity.activity_type.name == names.ACTIVITY_NOTIFY_PROGRESS and activity.heartbeat_details.payloads:
            (details,) = await data_converter.decode(
                activity.heartbeat_details.payloads, [internal_pb2.NotifyProgressResponse]
            )
            return list(details.deliveries)
    return []


async def test_progress_goes_on_after_a_handover(stack: Stack, narrow: Narrow) -> None:
    """No progress of the new worker is sent before that worker has reported its progress."""
    sizes = {"context_tokens": 8192, "max_output_tokens": 8192, "default_max_tokens": 64}
    model = {"name": "docstrings", "queue": "gpu-progress", **sizes}
    gateway = stack.add("gateway", {"GATEWAY_MODELS": json.dumps([model])})
    queue = {"GPU_WORKER_TASK_QUEUE": "gpu-progress", "GPU_WORKER_SHUTDOWN_GRACE": "PT0.2S"}
    first = stack.add("gpu-worker", queue)
    # For seconds Temporal then knows only that this worker has the job.
    second = stack.add("gpu-worker", {**queue, "GPU_WORKER_HEARTBEAT_INTERVAL": "PT6S"})
    for process in (gateway, first):
        await process.start()
        await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        stub = LlmServiceStub(channel)
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=told_job(narrow, "/handover")))).workflow_id
        await narrow.receiver.received("/handover", 3)
        await first.terminate()
        before = len(narrow.receiver.so_far("/handover"))
        await second.start()
        requests = await narrow.receiver.received("/handover", before + 2)
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
        assert (await watch(stub, id_)).states[-1] == "CANCELLED"
    for process in (second, gateway):
        await process.terminate()
    told = [request.event["data"]["status"] for request in requests[1:]]
    assert all(int(status_.get("progress", {}).get("outputTokens", 0)) > 0 for status_ in told), told
