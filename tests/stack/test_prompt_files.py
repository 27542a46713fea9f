"""Prompts that are files: read as a prompt in the job is, and refused at the edge."""

from collections.abc import AsyncIterator

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import common_pb2, llm_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.files import delete, new_file, upload
from tests.support.jobs import details_of, new_job, run_job

PARAMS = llm_pb2.SamplingParams(max_tokens=20, seed=7)


@pytest.fixture(scope="module")
async def files(stack: Stack) -> AsyncIterator[FileServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield FileServiceStub(channel)


def job_of(ref: common_pb2.FileRef, **changes: object) -> llm_pb2.JobRequest:
    job = new_job(params=PARAMS, **changes)
    job.ClearField("prompt")
    job.prompt_file.CopyFrom(ref)
    return job


async def refused(stub: LlmServiceStub, job: llm_pb2.JobRequest) -> dict[str, str]:
    """Return the violations of a Submit by their fields."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=60)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT, error.value
    return {found.field: found.description for found in details_of(error.value)["BadRequest"].field_violations}


async def test_a_file_is_read_as_a_prompt_is(stub: LlmServiceStub, files: FileServiceStub) -> None:
    text = "Grüße, 世界 🙂"
    ref = (await upload(files, new_file(), text.encode())).ref
    seen = await run_job(stub, job_of(ref))
    inline = await run_job(stub, new_job(text, params=PARAMS))
    assert seen.output == inline.output
    assert seen.final.result.metadata.prompt_tokens == inline.final.result.metadata.prompt_tokens
    only_id = await run_job(stub, job_of(common_pb2.FileRef(file_id=ref.file_id)))
    assert only_id.output == inline.output


async def test_a_repeat_finds_the_job_after_its_file_is_gone(stub: LlmServiceStub, files: FileServiceStub) -> None:
    ref = (await upload(files, new_file(), b"Say something.")).ref
    job = job_of(ref)
    seen = await run_job(stub, job)
    await delete(files, ref.file_id)
    again = await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=60)
    assert again.workflow_id == seen.final.status.workflow_id
    assert again.status.state == llm_pb2.JOB_STATE_SUCCEEDED


async def test_what_is_wrong_with_a_prompt_file_is_named(stub: LlmServiceStub, files: FileServiceStub) -> None:
    ref = (await upload(files, new_file(), b"text")).ref
    both = job_of(ref)
    both.prompt = "text"
    assert set(await refused(stub, both)) == {"job.prompt_file"}
    missing = common_pb2.FileRef(file_id=f"file-{'0' * 64}")
    assert set(await refused(stub, job_of(missing))) == {"job.prompt_file.file_id"}
    output = common_pb2.FileRef(file_id=f"output-{'0' * 64}")
    assert set(await refused(stub, job_of(output))) == {"job.prompt_file.file_id"}
    assert set(await refused(stub, job_of(common_pb2.FileRef(file_id="../x")))) == {"job.prompt_file.file_id"}
    other = common_pb2.FileRef(file_id=ref.file_id, sha256=b"0" * 32, size_bytes=5)
    assert set(await refused(stub, job_of(other))) == {"job.prompt_file.sha256", "job.prompt_file.size_bytes"}
    unfinished = (await upload(files, new_file(), b"text", last=False)).ref
    assert set(await refused(stub, job_of(unfinished))) == {"job.prompt_file.file_id"}
    for content, word in ((b"", "empty"), (b"text \xff text", "UTF-8 at byte 5"), (b"x" * 3_000_000, "at most")):
        bad = (await upload(files, new_file(), content)).ref
        assert word in (await refused(stub, job_of(bad)))["job.prompt_file"]
    cut = (await upload(files, new_file(), b"x" * (64 * 1024 - 1) + "🙂".encode())).ref
    seen = await run_job(stub, job_of(cut))
    assert b"PROMPT_TOO_LONG" in seen.final.status.error.SerializeToString()
