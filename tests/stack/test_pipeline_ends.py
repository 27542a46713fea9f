"""What comes after the end of a pipeline: its targets are notified, and DeleteJobs deletes it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import StringValue
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.support.deletions import run_exists, until_ended
from tests.support.deliveries import deliveries, settled, until
from tests.support.files import PATIENCE, bad_fields, refusal
from tests.support.pipelines import answer, asks, cancel, follow, get, new_pipeline, submit
from tests.support.receivers import Receiver, Request, receiving, status


@pytest.fixture(scope="module")
async def sink() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
async def pipelines(stack: Stack) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield PipelineServiceStub(channel)


def to(url: str, **changes: Any) -> llm_pb2.NotifyTarget:
    return llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=url, **changes))


async def test_the_end_of_a_pipeline_is_delivered_and_again(
    pipelines: Any, stub: LlmServiceStub, sink: Receiver
) -> None:
    """One event for the whole: its steps notify nobody."""
    target = to(sink.on("/pipeline", status(503), status(200)))
    id_ = (await submit(pipelines, new_pipeline("essay", StringValue(value="rain"), notify=[target]))).pipeline_id
    seen = await follow(pipelines, id_)
    event = (await sink.received("/pipeline", 2))[1].event
    log = await deliveries(stub, id_)
    assert (event["id"], event["type"], event["subject"]) == (log[0].id, "llm.v1.pipeline.succeeded", id_)
    assert event["time"] == seen.status.root.end_time.ToJsonString()
    told = json_format.ParseDict(event["data"]["status"], pipeline_pb2.PipelineStatus())
    ended = (await get(pipelines, id_)).status
    assert [shown.state for shown in ended.notifications] == [llm_pb2.NOTIFY_STATE_DELIVERED]
    ended.ClearField("notifications")
    assert told == ended
    await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=id_), timeout=PATIENCE)
    assert (await sink.received("/pipeline", 3))[2].event == event
    await until(stub, id_, settled)


async def test_the_outcome_of_a_pipeline_that_goes_on_is_delivered_although_the_one_before_was_not(
    pipelines: Any, stub: LlmServiceStub, sink: Receiver
) -> None:
    """It was given up within seconds: the workflow of the deliveries before had the id that its own would have."""
    up = asyncio.Event()

    async def reply(writer: asyncio.StreamWriter, request: Request) -> None:
        await status(200 if up.is_set() else 503)(writer, request)

    pipeline = new_pipeline("asking", StringValue(value="Now?"), notify=[to(sink.on("/again", reply))])
    for answer_id, approved in (("no", False), ("yes", True)):
        id_ = (await submit(pipelines, pipeline)).pipeline_id
        seen = await follow(pipelines, id_, until=asks)
        await answer(pipelines, id_, "ask", answer_id, approved=approved)
        seen = await follow(pipelines, id_, known=seen)
        assert [shown.state for shown in seen.status.notifications] != [llm_pb2.NOTIFY_STATE_DELIVERED]
    up.set()
    (entry,) = await until(stub, id_, settled)
    assert entry.state == llm_pb2.NOTIFY_STATE_DELIVERED
    assert sink.so_far("/again")[-1].event["type"] == "llm.v1.pipeline.succeeded"


async def test_every_outcome_is_delivered_but_not_to_openais_webhooks(pipelines: Any, sink: Receiver) -> None:
    targets = [to(sink.on("/outcome", status(200)))]
    failed = (await submit(pipelines, new_pipeline("broken", Struct(), notify=targets))).pipeline_id
    waiting = (await submit(pipelines, new_pipeline("careful", StringValue(value="x"), notify=targets))).pipeline_id
    await cancel(pipelines, waiting)
    await follow(pipelines, failed)
    await follow(pipelines, waiting)
    events = [request.event for request in await sink.received("/outcome", 2)]
    assert {event["subject"]: event["type"].rpartition(".")[2] for event in events} == {
        failed: "failed",
        waiting: "cancelled",
    }
    openai = new_pipeline("essay", notify=[*targets, to("http://127.0.0.1:1/x", format=llm_pb2.WEBHOOK_FORMAT_OPENAI)])
    assert await bad_fields(submit(pipelines, openai)) == {"pipeline.notify[1].webhook.format"}


@pytest.mark.parametrize("by", ["call", "temporal"])
async def test_a_cancel_while_the_outcome_is_delivered_changes_nothing_else(
    pipelines: Any, temporal: Client, sink: Receiver, by: str
) -> None:
    """The state forgot it."""
    path = f"/late-cancel-{by}"
    # A pipeline is open for 2 s at most then, which may be over on a busy machine.
    for tries in range(1, 6):
        may_end = asyncio.Event()

        async def reply(writer: asyncio.StreamWriter, request: Request, may_end: asyncio.Event = may_end) -> None:
            await may_end.wait()
            await status(200)(writer, request)

        pipeline = new_pipeline("essay", StringValue(value="rain"), notify=[to(sink.on(path, reply))])
        id_ = (await submit(pipelines, pipeline)).pipeline_id
        await sink.received(path, tries)
        if by == "call":
            asked = await cancel(pipelines, id_)
        else:
            await temporal.get_workflow_handle(id_).cancel()
            asked = (await get(pipelines, id_)).status
        may_end.set()
        seen = await follow(pipelines, id_)
        if asked.state == llm_pb2.JOB_STATE_RUNNING:
            break
    assert (asked.state, asked.cancel_requested) == (llm_pb2.JOB_STATE_RUNNING, True)
    for ended in (seen.status, (await get(pipelines, id_)).status, await cancel(pipelines, id_)):
        assert (ended.state, ended.cancel_requested) == (llm_pb2.JOB_STATE_SUCCEEDED, True)


async def test_deleting_the_jobs_of_a_user_deletes_their_pipelines(
    pipelines: Any, stub: LlmServiceStub, temporal: Client
) -> None:
    """One that has ended and one that runs, with all of their jobs. Their keys stay taken."""
    ended = new_pipeline("essay", StringValue(value="fog"))
    waiting = new_pipeline("careful", StringValue(value="x"), user_id=ended.user_id)
    ids = [(await submit(pipelines, pipeline)).pipeline_id for pipeline in (ended, waiting)]
    await follow(pipelines, ids[0])
    await follow(pipelines, ids[1], until=lambda seen: "review/approve" in seen.steps)
    run_ids = [(await temporal.get_workflow_handle(id_).describe()).run_id for id_ in ids]
    started = await stub.DeleteJobs(llm_pb2.DeleteJobsRequest(user_id=ended.user_id), timeout=PATIENCE)
    deletion = await until_ended(stub, started.deletion.deletion_id)
    assert deletion.state == llm_pb2.DELETION_STATE_DONE
    # Two pipelines, and the four jobs of one of them.
    assert deletion.deleted_jobs == 6
    for id_, run_id in zip(ids, run_ids, strict=True):
        assert not await run_exists(temporal, id_, run_id)
        assert await refusal(get(pipelines, id_)) == ("NOT_FOUND", "PIPELINE_NOT_FOUND")
    assert await refusal(answer(pipelines, ids[1], "review/approve", "a", approved=True)) == (
        "NOT_FOUND",
        "PIPELINE_NOT_FOUND",
    )
    assert await refusal(submit(pipelines, ended)) == ("ALREADY_EXISTS", "JOB_DELETED")
    outline = llm_pb2.GetStatusRequest(workflow_id=f"{ids[0]}/outline")
    assert await refusal(stub.GetStatus(outline, timeout=PATIENCE)) == ("NOT_FOUND", "JOB_NOT_FOUND")
    listed = await pipelines.ListPipelines(pipeline_pb2.ListPipelinesRequest(user_id=ended.user_id), timeout=PATIENCE)
    assert not listed.pipelines


async def test_a_pipeline_that_is_terminated_at_once_is_the_same_when_it_is_submitted_again(
    pipelines: Any, temporal: Client
) -> None:
    """It had neither a user nor a root."""
    pipeline = new_pipeline("essay", StringValue(value="rain"))
    id_ = (await submit(pipelines, pipeline)).pipeline_id
    await temporal.get_workflow_handle(id_).terminate()
    for found in ((await get(pipelines, id_)).status, await submit(pipelines, pipeline)):
        assert (found.state, found.user_id, found.name) == (llm_pb2.JOB_STATE_CANCELLED, pipeline.user_id, "essay")
        assert found.HasField("root")
