"""Deliveries that outlive their job: a slow receiver, and a gateway that is down when the delivery's time is over."""

import asyncio
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from google.rpc import code_pb2

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.deliveries import deliveries, settled, until
from tests.support.jobs import new_job, run_job, webhook
from tests.support.receivers import Receiver, Request, receiving, status
from tests.support.stacks import running

QUEUE = "late"
NOTIFY_QUEUE = "late-notifications"
HOLD = timedelta(seconds=2)
NEEDS = 5 * HOLD
"""Time that the slow receiver takes to answer."""


class Late(NamedTuple):
    """A gateway that alone runs its workflows, and a notifier with the default timeout of 30 s for receivers."""

    stub: LlmServiceStub
    gateway: Process
    receiver: Receiver


@pytest.fixture(scope="module")
async def late(stack: Stack) -> AsyncIterator[Late]:
    notifier = stack.add("notifier", {"NOTIFIER_TASK_QUEUE": NOTIFY_QUEUE, "NOTIFIER_WEBHOOK_TIMEOUT": "PT30S"})
    gateway = stack.add(
        "gateway",
        {
            "GATEWAY_WORKFLOW_QUEUE": QUEUE,
            "GATEWAY_NOTIFY_QUEUE": NOTIFY_QUEUE,
            "GATEWAY_NOTIFY_HOLD": "PT2S",
            "GATEWAY_NOTIFY_TIMEOUT": "PT40S",
            "GATEWAY_NOTIFY_MAX_DURATION": "PT8S",
        },
    )
    async with receiving() as receiver, running(stack, notifier, gateway) as stub:
        yield Late(stub, gateway, receiver)


async def test_a_receiver_that_is_slower_than_the_hold_is_waited_for(late: Late) -> None:
    """The job does not wait. Its attempt is cut off and repeated with the whole timeout under the same id."""

    async def slowly(writer: asyncio.StreamWriter, request: Request) -> None:
        await asyncio.sleep(NEEDS.total_seconds())
        await status(200)(writer, request)

    seen = await run_job(
        late.stub, new_job(params={"max_tokens": 1}, notify=webhook(late.receiver.on("/slow", slowly)))
    )
    ended = datetime.now(UTC)
    final = seen.final.status
    assert final.notifications[0].state == llm_pb2.NOTIFY_STATE_PENDING
    assert ended - final.end_time.ToDatetime(UTC) < NEEDS, "the job waited for the receiver"
    (entry,) = await until(late.stub, final.workflow_id, settled)
    assert entry.state == llm_pb2.NOTIFY_STATE_DELIVERED
    cut, *_, whole = entry.attempts
    # The notifier reports the cut, or the gateway if a busy machine leaves the notifier no time.
    assert cut.error.code in (code_pb2.DEADLINE_EXCEEDED, code_pb2.UNAVAILABLE)
    assert whole.http_status == 200
    assert {request.headers["webhook-id"] for request in late.receiver.so_far("/slow")} == {entry.id}


async def test_a_delivery_whose_time_is_over_meanwhile_is_tried_once_more(late: Late) -> None:
    """No gateway runs when an attempt fails and the time ends. The last attempt comes when a gateway runs again."""
    gone = asyncio.Event()

    async def outlive(writer: asyncio.StreamWriter, request: Request) -> None:
        late.gateway.signal(signal.SIGKILL)
        await late.gateway.wait()
        await status(503)(writer, request)
        gone.set()

    url = late.receiver.on("/outlive", status(429, retry_after="3"), outlive, status(200))
    seen = await run_job(late.stub, new_job(params={"max_tokens": 1}, notify=webhook(url)))
    id_ = seen.final.status.workflow_id
    (entry,) = await deliveries(late.stub, id_)
    end = entry.give_up_time.ToDatetime(UTC)
    await gone.wait()
    assert datetime.now(UTC) < end
    # Temporal's timers can be a second late.
    await asyncio.sleep((end - datetime.now(UTC)).total_seconds() + 1)
    await late.gateway.start()
    await late.gateway.wait_ready()
    (entry,) = await until(late.stub, id_, settled)
    assert entry.state == llm_pb2.NOTIFY_STATE_DELIVERED
    assert [entry.attempts[0].http_status, entry.attempts[-1].http_status] == [429, 200]
    assert len(entry.attempts) >= 3
