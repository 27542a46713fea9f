"""Batches and pipelines that are steps run again when their pipeline goes on after a failure."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from temporalio.client import Client
from temporalio.service import RPCError

from deploy.local.stack import Stack
from llm_pb import batch_pb2, llm_pb2, pipeline_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.support.batches import to_jsonl
from tests.support.files import PATIENCE, new_file, until, upload
from tests.support.jobs import until_output
from tests.support.pipelines import answer, follow, new_pipeline, submit


@pytest.fixture
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield channel


async def until_ended_runs(temporal: Client, workflow_id: str, count: int) -> None:
    """Return once Temporal lists so many ended runs under an id."""
    query = f"WorkflowId = '{workflow_id}' AND ExecutionStatus != 'Running'"

    async def are_listed() -> bool:
        return len([found async for found in temporal.list_workflows(query)]) == count

    await until(are_listed)


async def results_after(batches: Any, batch_id: str, cursor: str) -> tuple[list[batch_pb2.BatchItem], str]:
    """Return the items of an ended batch that come after a cursor, and the cursor of the last one."""
    request = batch_pb2.StreamBatchResultsRequest(batch_id=batch_id, cursor=cursor)
    items: list[batch_pb2.BatchItem] = []
    async for message in batches.StreamBatchResults(request, timeout=PATIENCE):
        items += message.items
        cursor = message.cursor
    return items, cursor


async def test_a_batch_that_runs_again_has_other_jobs_and_results_and_is_listed_once(
    channel: grpc.aio.Channel, temporal: Client
) -> None:
    """A watched line ended with the cancelled job of the run before, each run was a batch of the list, and who had read
    the results of the one missed those of the next."""
    pipelines, jobs, files = PipelineServiceStub(channel), LlmServiceStub(channel), FileServiceStub(channel)
    batches, key, runs = BatchServiceStub(channel), new_file(), set[str]()
    cursor = ""
    line = {"request_id": "line-0", "model": "docstrings", "prompt": "p", "params": {"max_tokens": 1000}, "watch": True}
    lines = (await upload(files, key, to_jsonl([line]))).ref
    pipeline = new_pipeline("watching-again", lines, user_id=key["file"].user_id)
    for answer_id, approved in (("no", False), ("yes", True)):
        id_ = (await submit(pipelines, pipeline)).pipeline_id
        job_id = f"{id_}/lines/0"

        async def is_another_run(job_id: str = job_id) -> bool:
            try:
                found = (await temporal.get_workflow_handle(job_id).describe()).run_id
            except RPCError:
                return False
            return found not in runs and not runs.add(found)

        await until(is_another_run)
        await until_output(jobs, job_id)
        await follow(pipelines, id_, until=lambda seen: "ask" in seen.steps and bool(seen.steps["ask"].question))
        await answer(pipelines, id_, "ask", answer_id, approved=approved)
        seen = await follow(pipelines, id_)
        (item,), cursor = await results_after(batches, f"{id_}/lines", cursor)
        assert item.index == 0
    assert (await results_after(batches, f"{id_}/lines", cursor))[0] == []
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status
    assert seen.steps["lines"].counts.succeeded == 1
    job = await jobs.GetStatus(llm_pb2.GetStatusRequest(workflow_id=job_id), timeout=PATIENCE)
    assert job.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert item.result == job.result
    await until_ended_runs(temporal, f"{id_}/lines", 2)
    of_user = batch_pb2.ListBatchesRequest(user_id=pipeline.user_id)
    (listed,) = (await batches.ListBatches(of_user, timeout=PATIENCE)).batches
    assert (listed.batch_id, listed.state) == (f"{id_}/lines", batch_pb2.BATCH_STATE_SUCCEEDED)
    of_user.states.append(batch_pb2.BATCH_STATE_CANCELLED)
    assert not (await batches.ListBatches(of_user, timeout=PATIENCE)).batches


async def test_a_pipeline_within_one_that_goes_on_is_listed_once(channel: grpc.aio.Channel, temporal: Client) -> None:
    stub, pipeline = PipelineServiceStub(channel), new_pipeline("nesting-again", StringValue(value="rain"))
    for answer_id, approved in (("no", False), ("yes", True)):
        id_ = (await submit(stub, pipeline)).pipeline_id
        await follow(stub, id_, until=lambda seen: "ask" in seen.steps and bool(seen.steps["ask"].question))
        await answer(stub, id_, "ask", answer_id, approved=approved)
        await follow(stub, id_)
    for workflow_id in (id_, f"{id_}/inner"):
        await until_ended_runs(temporal, workflow_id, 2)
    request = pipeline_pb2.ListPipelinesRequest(user_id=pipeline.user_id)
    listed = (await stub.ListPipelines(request, timeout=PATIENCE)).pipelines
    assert sorted(status.pipeline_id for status in listed) == [id_, f"{id_}/inner"]
