"""Pipelines whose code resists: a cancel and the end of their time stop them, and what they did is undone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

from deploy.local.stack import Stack
from jobs.errors import reason_of
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.support.files import PATIENCE
from tests.support.pipelines import cancel, follow, new_pipeline, submit

SUCCEEDED = pipeline_pb2.STEP_STATE_SUCCEEDED


@pytest.fixture(scope="module")
async def pipelines(stack: Stack) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield PipelineServiceStub(channel)


class Turns:
    """An activity that ends its work when it is cancelled, once it may."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.stopping = asyncio.Event()
        self.may_end = asyncio.Event()

    @activity.defn(name="Turn")
    async def turn(self, number: int) -> int:
        self.began.set()
        try:
            while True:
                activity.heartbeat()
                await asyncio.sleep(0.1)
        except asyncio.CancelledError:
            self.stopping.set()
            await asyncio.wait_for(self.may_end.wait(), PATIENCE)
        return number


@asynccontextmanager
async def taking_turns(temporal: Client, queue: str) -> AsyncIterator[tuple[Turns, Struct]]:
    turns, spec = Turns(), Struct()
    spec.update({"queue": queue})
    async with Worker(temporal, task_queue=queue, activities=[turns.turn]):
        yield turns, spec


async def test_a_cancel_counts_although_the_step_ends_well(pipelines: Any, temporal: Client) -> None:
    """A step that has ended its work keeps it, and no further step begins."""
    async with taking_turns(temporal, "turns-1") as (turns, spec):
        id_ = (await submit(pipelines, new_pipeline("unyielding", spec))).pipeline_id
        await asyncio.wait_for(turns.began.wait(), PATIENCE)
        await cancel(pipelines, id_)
        await asyncio.wait_for(turns.stopping.wait(), PATIENCE)
        turns.began.clear()
        turns.may_end.set()
        seen = await follow(pipelines, id_, until=lambda seen: seen.ended or turns.began.is_set())
    assert not turns.began.is_set(), "the next step has begun after the cancel"
    assert seen.status.state == llm_pb2.JOB_STATE_CANCELLED
    assert {path: step.state for path, step in seen.steps.items()} == {"turns": SUCCEEDED, "turns/0": SUCCEEDED}


async def test_a_broken_compensation_keeps_no_pipeline_open(pipelines: Any) -> None:
    """The others do their work nevertheless. A limit of 0 would let nothing begin, so it is an error."""
    seen = await follow(pipelines, (await submit(pipelines, new_pipeline("untidy", Struct()))).pipeline_id)
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert reason_of(seen.status.root.error) == "PROGRAM_ERROR"
    assert "limit must be 1 or more" in seen.status.root.error.message
    assert {path: step.state for path, step in seen.steps.items()} == {"undo": SUCCEEDED}
