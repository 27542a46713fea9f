"""What pipelines are made of besides single jobs: large outputs, files, batches, and pipelines within pipelines."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import names
from jobs.errors import reason_of
from jobs.pipelines import TASK_TIMEOUT
from llm_pb import batch_pb2, llm_pb2, pipeline_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.support.deletions import run_exists, until_ended
from tests.support.files import PATIENCE, download, new_file, refusal, upload
from tests.support.files import get as get_file
from tests.support.pipelines import Followed, answer, cancel, follow, get, new_pipeline, submit

SUCCEEDED = pipeline_pb2.STEP_STATE_SUCCEEDED


@pytest.fixture(scope="module")
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield channel


@pytest.fixture(scope="module")
def pipelines(channel: grpc.aio.Channel) -> Any:
    return PipelineServiceStub(channel)


@pytest.fixture(scope="module")
def files(channel: grpc.aio.Channel) -> FileServiceStub:
    return FileServiceStub(channel)


async def run(stub: Any, pipeline: pipeline_pb2.PipelineRequest) -> Followed:
    return await follow(stub, (await submit(stub, pipeline)).pipeline_id)


def text_of(seen: Followed) -> str:
    value = StringValue()
    assert seen.result is not None, seen.status
    assert seen.result.value.Unpack(value)
    return value.value


async def test_large_outputs_are_not_in_the_history(pipelines: Any, temporal: Client) -> None:
    """500 of them stay far below Temporal's 50 MiB. The code reads one, and passes one on."""
    seen = await run(pipelines, new_pipeline("large", Int32Value(value=8)))
    # The context of the small model does not take it: it was read.
    assert text_of(seen).split()[2:] == ["OUTPUT_TOO_LARGE", "PROMPT_TOO_LONG"]
    count, size = map(int, text_of(seen).split()[:2])
    assert (count, seen.steps["draft"].files[0].size_bytes) == (8, size)
    assert size > 64 * 1024
    parts = [seen.steps[f"parts/{number}/write"] for number in range(8)]
    assert all(len(part.files) == 1 and part.files[0].size_bytes > 64 * 1024 for part in parts)
    described = await temporal.get_workflow_handle(seen.status.pipeline_id).describe()
    history = described.raw_description.workflow_execution_info.history_size_bytes
    assert (history - size) / len(seen.steps) * 500 < 10 * 1024 * 1024


async def test_a_pipeline_reads_and_writes_the_files_of_its_user(pipelines: Any, files: FileServiceStub) -> None:
    key = new_file()
    ref = (await upload(files, key, "Grüße".encode())).ref
    seen = await run(pipelines, new_pipeline("librarian", ref, user_id=key["file"].user_id))
    assert text_of(seen).startswith("Grüße and more: ")
    written = seen.steps["notes"].files[0]
    assert (await get_file(files, written.file_id)).user_id == key["file"].user_id
    assert await download(files, written.file_id) == "Grüße and more".encode()
    # Nobody reads the file of another user by a pipeline.
    seen = await run(pipelines, new_pipeline("librarian", ref))
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert reason_of(seen.status.root.error) == "FILE_NOT_FOUND"
    binary = new_file()
    ref = (await upload(files, binary, b"\xff\xfe")).ref
    seen = await run(pipelines, new_pipeline("librarian", ref, user_id=binary["file"].user_id))
    assert reason_of(seen.status.root.error) == "FILE_IS_NO_TEXT"


async def test_a_step_is_a_batch(
    pipelines: Any, channel: grpc.aio.Channel, files: FileServiceStub, temporal: Client
) -> None:
    seen = await run(pipelines, new_pipeline("batching", Int32Value(value=5)))
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status
    step, status = seen.steps["lines"], batch_pb2.BatchStatus()
    assert seen.result is not None
    assert seen.result.value.Unpack(status)
    assert (step.state, step.counts.total, step.counts.succeeded) == (SUCCEEDED, 5, 5)
    assert step.usage.output_tokens == seen.status.root.usage.output_tokens == 20
    assert [*step.files] == [status.output]
    assert len((await download(files, status.output.file_id)).splitlines()) == 5
    # It is a batch like any other.
    found = await BatchServiceStub(channel).GetBatch(
        batch_pb2.GetBatchRequest(batch_id=step.workflow_id), timeout=PATIENCE
    )
    assert found.status == status
    # Where no gateway takes the activity that admits it, it waits for one as long as the pipeline has time.
    history = await temporal.get_workflow_handle(seen.status.pipeline_id).fetch_history()
    scheduled = [event.activity_task_scheduled_event_attributes for event in history.events]
    (admitted,) = (one for one in scheduled if one.activity_type.name == names.ACTIVITY_ADMIT_BATCH)
    assert admitted.schedule_to_close_timeout.ToTimedelta() > timedelta(hours=23)
    # One whose lines are bad fails, and so does its step.
    seen = await run(pipelines, new_pipeline("batching", Int32Value(value=0)))
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert seen.steps["lines"].state == pipeline_pb2.STEP_STATE_FAILED
    # One that begins in the last second of its pipeline is no bad batch.
    seen = await run(pipelines, new_pipeline("lingering", Int32Value(value=1), total_timeout={"seconds": 1}))
    assert seen.status.state == llm_pb2.JOB_STATE_TIMED_OUT, seen.status.root.error


@pytest.mark.long
async def test_a_pipeline_that_goes_on_has_other_files_is_listed_once_and_is_deleted_whole(
    pipelines: Any, channel: grpc.aio.Channel, files: FileServiceStub, temporal: Client
) -> None:
    """Its batch had the output of the run before, which may have been cut. Each run was a pipeline of the list. One
    that had succeeded was deleted with what had failed. The last run was deleted, what earlier ones held stayed, and
    the deletion of the user found them again for ever."""
    pipeline, outputs, runs = new_pipeline("batching-again", Int32Value(value=2)), list[str](), set[tuple[str, str]]()
    for answer_id, approved in (("no", False), ("yes", True)):
        id_ = (await submit(pipelines, pipeline)).pipeline_id
        seen = await follow(pipelines, id_, until=lambda seen: "ask" in seen.steps and bool(seen.steps["ask"].question))
        (output,) = seen.steps["lines"].files
        assert len((await download(files, output.file_id)).splitlines()) == 2
        outputs.append(output.file_id)
        for workflow_id in (id_, f"{id_}/lines"):
            runs.add((workflow_id, (await temporal.get_workflow_handle(workflow_id).describe()).run_id))
        await answer(pipelines, id_, "ask", answer_id, approved=approved)
        seen = await follow(pipelines, id_)
    assert outputs[0] != outputs[1]
    assert len(runs) == 4
    query = " OR ".join(f"RunId = '{run_id}' AND ExecutionStatus != 'Running'" for _, run_id in runs)
    async with asyncio.timeout(PATIENCE):
        while len([run async for run in temporal.list_workflows(query)]) != len(runs):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    request = pipeline_pb2.ListPipelinesRequest(user_id=pipeline.user_id)
    (listed,) = (await pipelines.ListPipelines(request, timeout=PATIENCE)).pipelines
    assert listed.root.end_time == seen.status.root.end_time
    of_user = batch_pb2.ListBatchesRequest(user_id=pipeline.user_id)
    (batch,) = (await BatchServiceStub(channel).ListBatches(of_user, timeout=PATIENCE)).batches
    assert batch.output.file_id == outputs[1]
    jobs: Any = LlmServiceStub(channel)
    failed = llm_pb2.DeleteJobsRequest(user_id=pipeline.user_id, states=[llm_pb2.JOB_STATE_FAILED])
    started = await jobs.DeleteJobs(failed, timeout=PATIENCE)
    assert (await until_ended(jobs, started.deletion.deletion_id)).deleted_jobs == 0
    started = await jobs.DeleteUser(llm_pb2.DeleteUserRequest(user_id=pipeline.user_id), timeout=PATIENCE)
    deletion = await until_ended(jobs, started.deletion.deletion_id)
    assert (deletion.deleted_jobs, deletion.deleted_batches) == (1, 1)
    assert not [run for run in runs if await run_exists(temporal, *run)]


async def test_the_counts_of_a_batch_are_those_of_its_step_while_it_runs(
    pipelines: Any, channel: grpc.aio.Channel, http: httpx.AsyncClient
) -> None:
    """In the stream, in the answer and in the console. They cost the pipeline nothing."""
    id_ = (await submit(pipelines, new_pipeline("lingering", Int32Value(value=3)))).pipeline_id
    done = lambda seen: "lines" in seen.steps and seen.steps["lines"].counts.succeeded == 3  # noqa: E731
    seen = await follow(pipelines, id_, until=done)
    step = seen.steps["lines"]
    assert (step.kind, step.state) == (pipeline_pb2.STEP_KIND_BATCH, pipeline_pb2.STEP_STATE_RUNNING)
    assert (step.counts.total, step.counts.running) == (4, 1)
    # Who comes back by the cursor has them again.
    again = await follow(pipelines, id_, known=Followed(cursor=seen.cursor), until=done)
    assert again.steps.keys() == {"lines"}
    assert (await get(pipelines, id_, "lines")).steps[0].counts == step.counts
    page = (await http.get(f"/console/pipelines/{id_}")).text
    assert "3 of 4" in page
    assert f'href="/console/batches/{id_}%2Flines"' in page
    assert (await http.get(f"/console/batches/{id_}%2Flines")).status_code == 200
    await cancel(pipelines, id_)
    seen = await follow(pipelines, id_, known=seen)
    found = await BatchServiceStub(channel).GetBatch(
        batch_pb2.GetBatchRequest(batch_id=step.workflow_id), timeout=PATIENCE
    )
    step = seen.steps["lines"]
    assert (step.counts, step.usage) == (found.status.counts, found.status.usage)
    assert step.usage.output_tokens > 12, "what a cancelled batch has used counts"
    assert found.status.error.message == seen.status.root.error.message == "enough"


async def test_a_step_is_a_pipeline(pipelines: Any, http: httpx.AsyncClient, temporal: Client) -> None:
    """It has a tree of its own, and its usage and counts are those of the step."""
    spec = Struct()
    spec.update({"code": "essay", "topics": ["rain", "snow"]})
    seen = await run(pipelines, new_pipeline("nesting", spec, budget={"output_tokens": 1000}))
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status
    texts = text_of(seen).split("|")
    for number, text in enumerate(texts):
        step = seen.steps[f"parts/{number}/write"]
        inner = await get(pipelines, step.workflow_id)
        value = StringValue()
        assert inner.result.value.Unpack(value)
        assert (value.value, inner.status.state) == (text, llm_pb2.JOB_STATE_SUCCEEDED)
        assert (step.kind, inner.steps[0].kind) == (pipeline_pb2.STEP_KIND_PIPELINE, pipeline_pb2.STEP_KIND_JOB)
        assert (step.counts, step.usage) == (inner.status.root.counts, inner.status.root.usage)
        assert (step.counts.succeeded, step.usage.output_tokens) == (4, 210)
        assert inner.steps[0].workflow_id == f"{seen.status.pipeline_id}/parts/{number}/write/outline"
    assert seen.status.left.output_tokens == 1000 - 420
    # The replay of a long one on a busy machine takes more than the 10 s that Temporal gives a task by default.
    for id_ in (seen.status.pipeline_id, step.workflow_id):
        begin = await anext(temporal.get_workflow_handle(id_).fetch_history_events())
        assert begin.workflow_execution_started_event_attributes.workflow_task_timeout.ToTimedelta() == TASK_TIMEOUT
    assert (seen.status.root.kind, seen.steps["parts"].kind) == (step.kind, pipeline_pb2.STEP_KIND_GROUP)
    page = (await http.get(f"/console/pipelines/{seen.status.pipeline_id}")).text
    link = f"/console/pipelines/{seen.status.pipeline_id}%2Fparts%2F0%2Fwrite"
    assert f'href="{link}"' in page
    assert (await http.get(link)).status_code == 200
    # What one has used counts also where it fails, and the reason is its own.
    spec.update({"code": "careless", "topics": ["rain"]})
    seen = await run(pipelines, new_pipeline("nesting", spec))
    assert text_of(seen) == "PROGRAM_ERROR"
    assert seen.status.root.usage.output_tokens == 4
    assert await refusal(get(pipelines, f"{seen.status.pipeline_id}/parts/1/write")) == (
        "NOT_FOUND",
        "PIPELINE_NOT_FOUND",
    )


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_many_items_are_split_among_pipelines(pipelines: Any) -> None:
    spec = Struct()
    spec.update({"count": 300, "size": 70})
    id_ = (await submit(pipelines, new_pipeline("many", spec))).pipeline_id
    seen = await follow(pipelines, id_, patience=600)
    assert seen.result is not None, seen.status.root.error
    value = Int32Value()
    assert seen.result.value.Unpack(value)
    assert value.value == 300
    assert seen.status.root.counts.total == 5
    assert seen.status.root.usage.output_tokens == 600


async def test_a_question_of_a_pipeline_within_counts_in_those_above(pipelines: Any) -> None:
    """Whoever looks for pipelines that need an answer finds them in a list, and where to answer in the tree."""
    whole = Struct()
    whole.update({"code": "careful", "topics": ["rain", "snow"]})
    id_ = (await submit(pipelines, new_pipeline("nesting", whole))).pipeline_id

    def asked(count: int) -> Callable[[Any], bool]:
        return lambda seen: bool(seen.status.root.counts.needs_answer == count)

    seen = await follow(pipelines, id_, until=asked(2))
    inner = seen.steps["parts/0/write"]
    assert (inner.counts.needs_answer, seen.steps["parts/0"].counts.needs_answer) == (1, 1)
    await answer(pipelines, inner.workflow_id, "review/approve", "a", approved=False)
    seen = await follow(pipelines, id_, known=seen, until=asked(1))
    assert seen.steps["parts/0/write"].counts.needs_answer == 0
    await cancel(pipelines, id_)
    seen = await follow(pipelines, id_, known=seen)
    assert seen.status.root.counts.needs_answer == 0


async def test_a_cancel_reaches_the_jobs_of_pipelines_within(pipelines: Any, stub: Any) -> None:
    spec = Struct()
    spec.update({"code": "lasting", "topics": ["rain"]})
    id_ = (await submit(pipelines, new_pipeline("nesting", spec))).pipeline_id
    inner, job = f"{id_}/parts/0/write", f"{id_}/parts/0/write/write"
    await follow(pipelines, id_, until=lambda seen: inner in {step.workflow_id for step in seen.steps.values()})
    await follow(pipelines, inner, "write", until=lambda seen: bool(seen.outputs))
    await pipelines.CancelPipeline(pipeline_pb2.CancelPipelineRequest(pipeline_id=id_), timeout=PATIENCE)
    assert (await follow(pipelines, id_)).status.state == llm_pb2.JOB_STATE_CANCELLED
    assert (await follow(pipelines, inner)).status.state == llm_pb2.JOB_STATE_CANCELLED
    status = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=job), timeout=PATIENCE)
    assert status.status.state == llm_pb2.JOB_STATE_CANCELLED
    assert status.result.output


async def test_a_pipeline_ends_before_its_history_is_full(pipelines: Any) -> None:
    """Temporal would terminate it, and nothing would be undone."""
    seen = await run(pipelines, new_pipeline("verbose", StringValue(value="x")))
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert reason_of(seen.status.root.error) == "HISTORY_FULL"
    assert 30 < seen.steps["texts"].counts.succeeded < 40
    assert seen.steps["undo"].state == SUCCEEDED
