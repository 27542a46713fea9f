"""Outputs of more than 1 MiB: files of the store that watchers get as text nevertheless."""

import random
from collections.abc import AsyncIterator

import grpc
import pytest
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs.resume_token import ResumeToken
from llm_pb import file_pb2, llm_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.files import PATIENCE, delete, download, get, listed, sha256
from tests.support.jobs import Seen, details_of, new_job, run_job, watch
from tests.support.watchers import watch_in_pieces, watch_on

TOKENS = 800
"""More than 3 MiB of text."""
INLINE_BYTES = 1024 * 1024


@pytest.fixture(scope="module")
async def files(stack: Stack) -> AsyncIterator[FileServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield FileServiceStub(channel)


def large_job(prompt: str = "", tokens: int = TOKENS, **changes: object) -> llm_pb2.JobRequest:
    params = llm_pb2.SamplingParams(max_tokens=tokens, seed=7)
    return new_job(f"[[wide]] {prompt}", params=params, **changes)


async def status_of(stub: LlmServiceStub, id_: str) -> llm_pb2.GetStatusResponse:
    response: llm_pb2.GetStatusResponse = await stub.GetStatus(
        llm_pb2.GetStatusRequest(workflow_id=id_), timeout=PATIENCE
    )
    return response


def assert_is_file(result: llm_pb2.JobResult, output: bytes) -> None:
    """Assert that the result names a file that holds the output."""
    assert not result.output
    assert (result.output_file.size_bytes, result.output_file.sha256) == (len(output), sha256(output))


@pytest.fixture(scope="module")
async def seen(stub: LlmServiceStub) -> Seen:
    """What a watcher of a large job saw while the job ran."""
    return await run_job(stub, large_job())


async def test_a_large_output_is_a_file_and_watchers_get_its_text(seen: Seen, stub: LlmServiceStub) -> None:
    final = seen.final
    assert final.status.state == llm_pb2.JOB_STATE_SUCCEEDED, final.status.error
    assert len(seen.output) > 3 * INLINE_BYTES
    assert seen.rewinds == 0
    assert final.output_omitted
    assert_is_file(final.result, seen.output)
    assert final.status.progress.output_bytes == len(seen.output)
    id_ = final.status.workflow_id
    assert (await status_of(stub, id_)).result == final.result
    job = await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=id_), timeout=PATIENCE)
    assert job.result == final.result


async def test_late_watchers_get_the_text_from_any_place(seen: Seen, stub: LlmServiceStub) -> None:
    id_, output = seen.final.status.workflow_id, seen.output
    late = await watch(stub, id_)
    assert late.output == output
    assert late.rewinds == 0
    assert late.final.result == seen.final.result
    assert (late.next_offset, late.resume_token) == (seen.next_offset, seen.resume_token)
    chance = random.Random(17)
    for tokens in (0, 1):
        assert (await watch_in_pieces(stub, id_, chance, tokens=tokens)).output == output
    behind = Seen(output=output[:1_000_003], next_offset=1_000_003)
    while output[behind.next_offset] & 0xC0 == 0x80:
        behind = Seen(output=output[: behind.next_offset - 1], next_offset=behind.next_offset - 1)
    await watch_on(stub, id_, behind)
    assert behind.output == output


async def test_a_watcher_of_another_text_is_rewound(seen: Seen, stub: LlmServiceStub) -> None:
    wrong = Seen(output=b"x" * 100_000, next_offset=100_000)
    await watch_on(stub, seen.final.status.workflow_id, wrong, str(ResumeToken(100_000, "0123456789abcdef")))
    assert wrong.output == seen.output
    assert wrong.rewinds == 1


async def test_logprobs_come_with_the_text(stub: LlmServiceStub) -> None:
    job = large_job(tokens=400)
    job.params.logprobs = 2
    live = await run_job(stub, job)
    assert live.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED, live.final.status.error
    id_ = live.final.status.workflow_id
    result = (await status_of(stub, id_)).result
    assert_is_file(result, live.output)
    assert len(result.logprobs) == 400
    late, chance = await watch(stub, id_), random.Random(3)
    broken = await watch_in_pieces(stub, id_, chance, tokens=1)
    for seen in (live, late, broken):
        assert seen.output == live.output
        assert seen.logprobs == list(result.logprobs)


async def test_the_file_belongs_to_the_job(seen: Seen, stub: LlmServiceStub, files: FileServiceStub) -> None:
    ref = seen.final.result.output_file
    file = await get(files, ref.file_id)
    assert (file.ref, file.state, file.committed_bytes) == (ref, file_pb2.FILE_STATE_READY, ref.size_bytes)
    assert await download(files, ref.file_id) == seen.output
    assert await download(files, ref.file_id, 1_000_000, 10) == seen.output[1_000_000:1_000_010]
    assert file not in await listed(files, user_id=file.user_id)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await delete(files, ref.file_id)
    assert (error.value.code().name, details_of(error.value)["ErrorInfo"].reason) == (
        "FAILED_PRECONDITION",
        "FILE_OF_JOB",
    )
    other = f"{ref.file_id[:-1]}{'0' if ref.file_id[-1] != '0' else '1'}"
    for call in (get(files, other), download(files, other)):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_temporal_holds_a_reference_alone(seen: Seen, temporal: Client) -> None:
    description = await temporal.get_workflow_handle(seen.final.status.workflow_id).describe()
    assert description.raw_description.workflow_execution_info.history_size_bytes < 20_000
