"""A pipeline that goes on after a failure takes JSON from its earlier run, also where that is a file."""

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import Int32Value
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import names
from jobs.errors import reason_of
from jobs.limits import MAX_STEP_INLINE_BYTES
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from payload_converter import data_converter
from tests.support.pipelines import answer, asks, follow, new_pipeline, submit
from tests.support.stacks import stack_settings
from tests.support.worlds import LONG_OUTPUTS


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    services = ("temporal", "nats", "gateway", "gpu-worker")
    folder = tmp_path_factory.mktemp("resumes")
    async with Stack(stack_settings(folder), only=services, environment=LONG_OUTPUTS) as stack:
        yield stack


@pytest.fixture(scope="module")
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield channel


async def test_json_that_is_a_file_is_not_generated_again(stack: Stack, channel: grpc.aio.Channel) -> None:
    pipelines: Any = PipelineServiceStub(channel)
    request = new_pipeline("forming", Int32Value(value=MAX_STEP_INLINE_BYTES))
    id_ = (await submit(pipelines, request)).pipeline_id
    seen = await follow(pipelines, id_, until=asks)
    assert [file.size_bytes > MAX_STEP_INLINE_BYTES for file in seen.steps["form"].files] == [True]
    await answer(pipelines, id_, "ask", "no", approved=False)
    before = await follow(pipelines, id_, known=seen)
    assert reason_of(before.status.root.error) == "INCOMPLETE"
    await submit(pipelines, request)
    seen = await follow(pipelines, id_, until=asks)
    assert seen.steps["form"].files == before.steps["form"].files
    await answer(pipelines, id_, "ask", "yes", approved=True)
    seen = await follow(pipelines, id_, known=seen)
    value = Int32Value()
    assert seen.result is not None, seen.status.root.error
    assert seen.result.value.Unpack(value)
    assert value.value == MAX_STEP_INLINE_BYTES
    assert seen.status.root.usage == before.status.root.usage
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    events = (await temporal.get_workflow_handle(id_).fetch_history()).events
    called = Counter(event.activity_task_scheduled_event_attributes.activity_type.name for event in events)
    assert called[names.ACTIVITY_READ_TEXT] == 1
    assert not any(event.HasField("start_child_workflow_execution_initiated_event_attributes") for event in events)


@pytest.mark.long
async def test_a_file_of_cut_json_is_generated_again(channel: grpc.aio.Channel) -> None:
    """Otherwise its pipeline would fail for ever: the job has succeeded."""
    pipelines, jobs = PipelineServiceStub(channel), LlmServiceStub(channel)
    request = new_pipeline("forming", Int32Value(value=100_000))
    id_ = (await submit(pipelines, request)).pipeline_id
    job, runs = llm_pb2.GetStatusRequest(workflow_id=f"{id_}/form"), set()
    for _ in range(2):
        seen = await follow(pipelines, id_)
        assert reason_of(seen.status.root.error) == "INVALID_OUTPUT"
        assert len(seen.steps["form"].files) == 1
        runs.add((await jobs.GetStatus(job)).status.run_id)
        assert (await submit(pipelines, request)).state == llm_pb2.JOB_STATE_RUNNING
    assert len(runs) == 2
    await follow(pipelines, id_)
