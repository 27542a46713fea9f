"""DeleteUser: nothing is left of what a user has, whatever it is and whichever process dies meanwhile."""

import asyncio
import uuid
from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf.wrappers_pb2 import Int32Value
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import names
from llm_pb import batch_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from tests.support.batches import Stubs, lines_of, new_batch, to_jsonl
from tests.support.deletions import PATIENCE, feed_holds, until_ended, until_no_rows
from tests.support.files import messages, new_file, refusal, upload
from tests.support.jobs import new_job, until_answered, until_output
from tests.support.pipelines import follow, new_pipeline
from tests.support.pipelines import submit as submit_pipeline
from tests.support.schedules import create, new_schedule, trigger

pytestmark = pytest.mark.timeout(600)


def objects_of(stack: Stack) -> set[Path]:
    """Return the files of the stack's store."""
    return {path for path in (stack.state_dir / "store").rglob("*") if path.is_file()}


async def test_the_batch_of_a_pipeline_is_deleted_as_a_batch(stack: Stack, stub: LlmServiceStub) -> None:
    """Its id is that of a step, and does not say what it is."""
    user = f"leaver-{uuid.uuid4().hex[:8]}"
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        batches = BatchServiceStub(channel)  # type: ignore[no-untyped-call]
        pipelines = PipelineServiceStub(channel)  # type: ignore[no-untyped-call]
        id_ = (
            await submit_pipeline(pipelines, new_pipeline("lingering", Int32Value(value=3), user_id=user))
        ).pipeline_id
        seen = await follow(pipelines, id_, until=lambda seen: "lines" in seen.steps)
        batch = batch_pb2.GetBatchRequest(batch_id=seen.steps["lines"].workflow_id)
        assert (await batches.GetBatch(batch, timeout=PATIENCE)).status.batch_id == batch.batch_id
        started = await stub.DeleteUser(llm_pb2.DeleteUserRequest(user_id=user), timeout=PATIENCE)
        request = llm_pb2.GetDeletionRequest(deletion_id=started.deletion.deletion_id)
        async with asyncio.timeout(PATIENCE):
            while True:
                deletion = (await stub.GetDeletion(request, timeout=PATIENCE)).deletion
                if deletion.deleted_jobs + deletion.deleted_batches == 2:
                    break
                await asyncio.sleep(0.1)
        assert (deletion.deleted_jobs, deletion.deleted_batches) == (1, 1)
        assert await refusal(batches.GetBatch(batch, timeout=PATIENCE)) == ("NOT_FOUND", "BATCH_NOT_FOUND")


@pytest.mark.long
async def test_nothing_is_left_of_a_user(stack: Stack, stub: LlmServiceStub, temporal: Client) -> None:
    """Jobs, a pipeline, batches, files, a begun upload and a schedule with its runs; the gateway dies in between.

    What another user has stays, and so do the keys: a late retry starts nothing again.
    """
    marker, user = f"marker{uuid.uuid4().hex}", f"leaver-{uuid.uuid4().hex[:8]}"
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        files, batches = FileServiceStub(channel), BatchServiceStub(channel)  # type: ignore[no-untyped-call]
        stubs = Stubs(files, batches)
        schedules = ScheduleServiceStub(channel)  # type: ignore[no-untyped-call]
        pipelines = PipelineServiceStub(channel)  # type: ignore[no-untyped-call]
        before = objects_of(stack)
        other = await upload(files, new_file(file={"user_id": f"{user}-2"}), b"kept")
        others = objects_of(stack) - before

        line = {"model": "docstrings", "prompt": marker, "params": {"max_tokens": 3}}
        lines = to_jsonl([{"request_id": "a", **line}, {"request_id": "b", **line, "watch": True}])
        ended = await new_batch(stubs, lines, user)
        await stubs.end((await stubs.create(ended)).batch_id)
        waiting = await stubs.create(await new_batch(stubs, lines_of(2), user))
        begun = files.UploadFile(messages(new_file(file={"user_id": user}), b"begun", last=False), timeout=PATIENCE)
        assert (await begun).file.committed_bytes
        pipeline = new_pipeline("careful", user_id=user)
        await submit_pipeline(pipelines, pipeline)
        running = new_job(f"{marker} runs", user_id=user, params={"max_tokens": 8000})
        job_id = (await stub.Submit(llm_pb2.SubmitRequest(job=running))).workflow_id
        await until_output(stub, job_id)
        schedule = new_schedule(marker, user_id=user, params={"max_tokens": 8000})
        await trigger(schedules, await create(schedules, schedule))

        async with httpx.AsyncClient(base_url=f"http://{stack.address('http')}", timeout=PATIENCE) as http:
            started = await http.delete(f"/users/{user}")
        assert started.status_code == 202
        deletion_id = started.json()["deletion"]["deletion_id"]
        assert started.headers["location"] == f"/deletions/{deletion_id}"
        request = llm_pb2.GetDeletionRequest(deletion_id=deletion_id)
        async with asyncio.timeout(PATIENCE):
            while not (await stub.GetDeletion(request, timeout=PATIENCE)).deletion.deleted_schedules:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await stack.processes["gateway"].kill()
        await stack.processes["gateway"].start()
        await until_answered(lambda: stub.GetDeletion(request, wait_for_ready=True, timeout=PATIENCE))
        await until_answered(
            lambda: files.ListFiles(file_pb2.ListFilesRequest(), wait_for_ready=True, timeout=PATIENCE)
        )
        deletion = await until_ended(stub, deletion_id)

        assert deletion.state == llm_pb2.DELETION_STATE_DONE
        assert deletion.deleted_batches == 2
        # Two inputs, an output and the upload; and the errors of the cancelled batch, if its lines were read by then.
        assert deletion.deleted_files in (4, 5)
        # The job, that of the batch's line, that of the schedule, the pipeline and those of its steps.
        assert deletion.deleted_jobs >= 4
        assert deletion.deleted_schedules == 1
        assert {copy.place for copy in deletion.unreached} >= {"logs", "traces", "backups"}
        await until_no_rows(stack, marker)
        assert not await feed_holds(stack, marker)
        assert objects_of(stack) - before == others
        assert (await files.GetFile(file_pb2.GetFileRequest(file_id=other.ref.file_id))).file == other
        async with asyncio.timeout(PATIENCE):
            while await left(stub, files, batches, pipelines, schedules, user):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert await refusal(stubs.get(waiting.batch_id)) == ("NOT_FOUND", "BATCH_NOT_FOUND")
        assert await refusal(stub.Submit(llm_pb2.SubmitRequest(job=running))) == ("ALREADY_EXISTS", "JOB_DELETED")
        assert await refusal(submit_pipeline(pipelines, pipeline)) == ("ALREADY_EXISTS", "JOB_DELETED")
        ended.input.CopyFrom((await upload(files, new_file(file={"user_id": user}), b"x")).ref)
        assert await refusal(stubs.create(ended)) == ("ALREADY_EXISTS", "JOB_DELETED")
    kept = f"{names.USER_ID.name} = '{user}' AND WorkflowType != '{names.FILE_WORKFLOW_TYPE}'"
    kinds = {item.workflow_type async for item in temporal.list_workflows(kept)}
    assert kinds <= {names.DELETION_WORKFLOW_TYPE, names.USER_DELETION_WORKFLOW_TYPE}


async def left(
    stub: LlmServiceStub,
    files: FileServiceStub,
    batches: BatchServiceStub,
    pipelines: PipelineServiceStub,
    schedules: ScheduleServiceStub,
    user: str,
) -> int:
    """Return the number of things that the API lists of a user."""
    jobs = (await stub.List(llm_pb2.ListRequest(user_id=user))).jobs
    return len(jobs) + sum(
        map(
            len,
            (
                (await files.ListFiles(file_pb2.ListFilesRequest(user_id=user))).files,
                (await batches.ListBatches(batch_pb2.ListBatchesRequest(user_id=user))).batches,
                (await pipelines.ListPipelines(pipeline_pb2.ListPipelinesRequest(user_id=user))).pipelines,
                (await schedules.ListSchedules(schedule_pb2.ListSchedulesRequest(user_id=user))).schedules,
            ),
        )
    )
