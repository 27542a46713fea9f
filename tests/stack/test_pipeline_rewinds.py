"""Readers of a pipeline after a crash has taken back what the pipeline had just done."""

import asyncio
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue
from pydantic import SecretStr
from temporalio.client import Client

from deploy.local.stack import Stack
from feed.feed import FeedSettings
from feed.nats import NatsFeed
from jobs import names
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.support.files import until
from tests.support.pipelines import Followed, answer, follow, get, new_pipeline, submit


async def test_what_a_crash_has_taken_back_is_in_no_tree_at_the_end(stack: Stack, temporal: Client) -> None:
    """It may have published changes of the tree that its workflow task, which is lost, would have made durable."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        stub: Any = PipelineServiceStub(channel)
        id_ = (await submit(stub, new_pipeline("careful", StringValue(value="rain")))).pipeline_id
        asks = lambda seen: any(step.question for step in seen.steps.values())  # noqa: E731
        seen = await follow(stub, id_, until=asks)
        handle = temporal.get_workflow_handle(id_)
        record: internal_pb2.PipelineRecord = await handle.query(
            names.QUERY_GET_RECORD, result_type=internal_pb2.PipelineRecord
        )
        lost, since = internal_pb2.PipelineRecord(status=record.status, version=record.version + 1000), record.version
        for node in record.nodes:
            lost.nodes.add(number=node.number, version=lost.version).step.CopyFrom(node.step)
            lost.nodes[-1].step.question, lost.nodes[-1].step.state = "", pipeline_pb2.STEP_STATE_RUNNING
        phantom = pipeline_pb2.StepStatus(path="review/phantom", state=pipeline_pb2.STEP_STATE_RUNNING)
        lost.nodes.add(number=len(record.nodes), version=lost.version, step=phantom)
        has_phantom = lambda seen: "review/phantom" in seen.steps  # noqa: E731
        # The one finds out on its stream, the other one comes back after the end.
        late, known = Followed(steps=dict(seen.steps), cursor=seen.cursor), seen.messages
        finding_out = asyncio.create_task(
            follow(stub, id_, known=seen, until=lambda seen: asks(seen) and has_phantom(late) and not has_phantom(seen))
        )
        leaving = asyncio.create_task(follow(stub, id_, known=late, until=has_phantom))
        await until(lambda: bool(late.messages) and seen.messages > known)
        feed = NatsFeed(FeedSettings(url=SecretStr(f"nats://{stack.address('nats')}")))
        feed.start()
        run_id = (await handle.describe()).run_id
        change = internal_pb2.FeedRecord(pipeline_change={"since": since, "record": lost})
        await until(lambda: feed.sync(run_id, change))
        await feed.close()
        await leaving
        await finding_out
        await answer(stub, id_, "review/approve", "no", approved=False)
        await follow(stub, id_, known=seen)
        await follow(stub, id_, known=late)
        assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status
        steps = {step.path: step for step in (await get(stub, id_)).steps}
        assert seen.steps == steps
        assert late.steps == steps
