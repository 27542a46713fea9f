"""The end of a batch is delivered as that of a job: by the same targets, formats, retries, log and Redeliver."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
from google.protobuf import json_format
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb import batch_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.stack.test_batches import replay
from tests.support.batches import Stubs, create, lines_of
from tests.support.deliveries import deliveries, settled, until
from tests.support.files import refusal
from tests.support.receivers import Receiver, Request, receiving, status
from tests.support.stacks import FAST

SECRET: str = json.loads(FAST["notifier"]["NOTIFIER_WEBHOOK_SECRETS"])[0]
DELIVERED = llm_pb2.NOTIFY_STATE_DELIVERED


@pytest.fixture(scope="module")
async def sink() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def stubs(stack: Stack) -> AsyncIterator[Stubs]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield Stubs(FileServiceStub(channel), BatchServiceStub(channel))


def to(url: str, **changes: Any) -> llm_pb2.NotifyTarget:
    return llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=url, **changes))


def to_openai(url: str) -> llm_pb2.NotifyTarget:
    return to(url, format=llm_pb2.WEBHOOK_FORMAT_OPENAI)


def unwrapped(request: Request) -> Any:
    """Return the event as OpenAI's client does."""
    return openai.OpenAI(api_key="none", webhook_secret=SECRET).webhooks.unwrap(request.body, request.headers)


async def test_the_end_of_a_batch_is_delivered_in_both_formats_and_again(
    stubs: Stubs, stub: LlmServiceStub, sink: Receiver, temporal: Client
) -> None:
    lines = lines_of(3, model="docstrings")
    params = llm_pb2.SamplingParams(max_tokens=2)
    targets = [to(sink.on("/ours", status(503), status(200))), to_openai(sink.on("/openai", status(200)))]
    created = await create(stubs, lines, notify=targets, defaults=llm_pb2.JobRequest(params=params), labels={"a": "b"})
    ended = await stubs.end(created.batch_id)
    first, again = await sink.received("/ours", 2)
    assert first.body == again.body
    event = again.event
    log = await deliveries(stub, ended.batch_id)
    assert [entry.type for entry in log] == ["llm.v1.batch.succeeded"] * 2
    assert [shown.state for shown in ended.notifications] == [DELIVERED] * 2
    assert (event["id"], event["type"], event["subject"]) == (log[0].id, "llm.v1.batch.succeeded", ended.batch_id)
    assert event["time"] == ended.end_time.ToJsonString()
    data = event["data"]
    assert (data["userId"], data["requestId"]) == (ended.user_id, ended.request_id)
    shown = batch_pb2.BatchStatus()
    shown.CopyFrom(ended)
    shown.ClearField("notifications")
    assert batch_status(data["status"]) == shown
    (sent,) = await sink.received("/openai")
    parsed = unwrapped(sent)
    assert (parsed.type, parsed.data.id) == ("batch.completed", ended.batch_id)
    assert parsed.created_at == ended.end_time.seconds
    assert type(parsed).__module__.startswith("openai.types.webhooks.batch_")
    await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=ended.batch_id, delivery_ids=[log[1].id]))
    repeated = (await sink.received("/openai", 2))[1]
    assert repeated.headers["webhook-id"] == sent.headers["webhook-id"]
    await until(stub, ended.batch_id, settled)
    await replay(await temporal.get_workflow_handle(ended.batch_id).fetch_history())


def batch_status(value: dict[str, Any]) -> batch_pb2.BatchStatus:
    return json_format.ParseDict(value, batch_pb2.BatchStatus())


async def test_a_batch_does_not_wait_long_for_a_receiver_that_is_down(
    stubs: Stubs, stub: LlmServiceStub, sink: Receiver
) -> None:
    is_up = asyncio.Event()

    async def reply(writer: asyncio.StreamWriter, request: Request) -> None:
        await status(200 if is_up.is_set() else 503)(writer, request)

    created = await create(stubs, b"{}\n", notify=[to(sink.on("/down", reply)), to_openai(sink.on("/up", status(200)))])
    failed = None
    async for message in stubs.batches.StreamBatch(batch_pb2.StreamBatchRequest(batch_id=created.batch_id)):
        failed = message.status
    assert failed is not None
    assert failed.state == batch_pb2.BATCH_STATE_FAILED
    assert [shown.state for shown in failed.notifications] == [llm_pb2.NOTIFY_STATE_PENDING, DELIVERED]
    assert unwrapped((await sink.received("/up"))[0]).type == "batch.failed"
    # No call of jobs deletes it, although its deliveries are found by its id.
    by_its_id = llm_pb2.DeleteJobRequest(workflow_id=created.batch_id)
    assert await refusal(stub.DeleteJob(by_its_id, timeout=60)) == ("NOT_FOUND", "JOB_NOT_FOUND")
    is_up.set()
    await until(stub, created.batch_id, settled)
    later = await stubs.get(created.batch_id)
    assert [shown.state for shown in later.notifications] == [DELIVERED] * 2
    assert sink.so_far("/down")[-1].event["type"] == "llm.v1.batch.failed"


async def test_a_cancelled_batch_says_so_and_one_without_targets_notifies_nobody(
    stubs: Stubs, stub: LlmServiceStub, sink: Receiver
) -> None:
    created = await create(stubs, lines_of(2), notify=[to_openai(sink.on("/cancelled", status(200)))])
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=created.batch_id))
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await stubs.cancel(created.batch_id)
    await stubs.end(created.batch_id)
    assert unwrapped((await sink.received("/cancelled"))[0]).type == "batch.cancelled"
    without = await stubs.end((await create(stubs, b"{}\n")).batch_id)
    # The operator of this stack has no endpoint: see test_operator_targets.
    assert not without.notifications
