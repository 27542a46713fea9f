"""The record of a file: commits whose answers were lost, the number of segments, calls that stall, repeats."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import file_id, file_workflow_id
from jobs.memo import to_memo
from llm_pb import common_pb2, file_pb2, internal_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.support.files import (
    PATIENCE,
    OpenUpload,
    bad_fields,
    download,
    get,
    new_file,
    upload,
)
from tests.support.temporal_proxy import temporal_proxy

MAX_SEGMENTS = 8192


@pytest.fixture(scope="session")
async def files(stack: Stack) -> AsyncIterator[FileServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield FileServiceStub(channel)


async def start_record(temporal: Client, segments: int = 0) -> WorkflowHandle[Any, Any]:
    """Start the record of a file that has some segments of a byte each."""
    id_ = file_id("of-a-test", uuid.uuid4().hex, "")
    file = file_pb2.File(
        ref=common_pb2.FileRef(file_id=id_), state=file_pb2.FILE_STATE_UPLOADING, committed_bytes=segments
    )
    record = internal_pb2.FileRecord(file=file)
    for number in range(segments):
        record.segments.add(name=f"files/-/{id_}/{number}", size=1)
    return await temporal.start_workflow(
        names.FILE_WORKFLOW_TYPE, record, id=file_workflow_id(id_, ""), task_queue=names.WORKFLOW_QUEUE
    )


async def commit(record: WorkflowHandle[Any, Any], offset: int, name: str, *, last: bool = False) -> file_pb2.File:
    """Commit a segment of 3 bytes, as each try of a gateway does."""
    segment = internal_pb2.FileSegment(name=name, size=3)
    request = internal_pb2.CommitSegmentRequest(offset=offset, segment=segment, last=last, sha256=b"x" if last else b"")
    file: file_pb2.File = await record.execute_update(names.UPDATE_COMMIT_SEGMENT, request, result_type=file_pb2.File)
    return file


async def test_a_repeated_commit_succeeds_whatever_was_committed_after_it(temporal: Client) -> None:
    record = await start_record(temporal)
    await commit(record, 0, "first")
    await commit(record, 3, "second")
    assert (await commit(record, 0, "first")).committed_bytes == 6
    ready = await commit(record, 6, "third", last=True)
    for offset, name in ((0, "first"), (3, "second")):
        assert await commit(record, offset, name) == ready
    assert await commit(record, 6, "third", last=True) == ready
    stored = await record.query(names.QUERY_GET_RECORD, result_type=internal_pb2.FileRecord)
    assert [segment.name for segment in stored.segments] == ["first", "second", "third"]
    await record.execute_update(names.UPDATE_DELETE_FILE)


@pytest.mark.parametrize("code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED])
async def test_a_commit_whose_answer_was_lost_loses_no_data(
    stack: Stack, files: FileServiceStub, code: grpc.StatusCode
) -> None:
    """Another upload ends the file before the first one repeats its commit."""
    async with temporal_proxy(stack.address("temporal")) as (proxy, address):
        process = stack.add("gateway", {"TEMPORAL_ADDRESS": address, "GATEWAY_ROLE": "api"})
        await process.start()
        await process.wait_ready()
        key = new_file()

        async def end_the_file() -> None:
            await upload(files, key, b"abc123", 3)

        async with grpc.aio.insecure_channel(stack.address(process.name)) as channel:
            proxy.lost["UpdateWorkflowExecution"] = (code, end_the_file)
            first = await upload(FileServiceStub(channel), key, b"abc", last=False)
        assert not proxy.lost
        assert first.committed_bytes == 3
        assert await download(files, first.ref.file_id) == b"abc123"
        await process.terminate()


async def test_a_file_has_a_maximum_of_segments(temporal: Client) -> None:
    record = await start_record(temporal, MAX_SEGMENTS - 1)
    await commit(record, MAX_SEGMENTS - 1, "the last one")
    end = MAX_SEGMENTS + 2
    with pytest.raises(WorkflowUpdateFailedError) as refused:
        await commit(record, end, "one more")
    assert isinstance(refused.value.cause, ApplicationError)
    assert refused.value.cause.type == "TOO_MANY_SEGMENTS"
    request = internal_pb2.CommitSegmentRequest(offset=end, last=True, sha256=b"x")
    ready: file_pb2.File = await record.execute_update(names.UPDATE_COMMIT_SEGMENT, request, result_type=file_pb2.File)
    assert ready.state == file_pb2.FILE_STATE_READY, "the end of a file is no segment"
    await record.execute_update(names.UPDATE_DELETE_FILE)


async def test_a_file_of_too_many_segments_is_refused(files: FileServiceStub, temporal: Client) -> None:
    key = new_file()
    begun = await upload(files, key, b"", last=False)
    record = temporal.get_workflow_handle(file_workflow_id(begun.ref.file_id, ""))
    for number in range(3):
        await commit(record, number * 3, f"{number}")
    full = await record.query(names.QUERY_GET_RECORD, result_type=internal_pb2.FileRecord)
    await record.execute_update(names.UPDATE_DELETE_FILE)
    await record.result()
    for number in range(3, MAX_SEGMENTS):
        full.segments.add(name=f"{number}")
    digest = await (await record.describe()).memo_value(names.MEMO_FILE_DIGEST)
    again = await temporal.start_workflow(
        names.FILE_WORKFLOW_TYPE,
        full,
        id=record.id,
        task_queue=names.WORKFLOW_QUEUE,
        memo={names.MEMO_FILE: to_memo(full.file), names.MEMO_FILE_DIGEST: digest},
    )
    assert await bad_fields(upload(files, key, b"012345678 and more", 9, last=False)) == {"data"}
    assert (await get(files, begun.ref.file_id)).committed_bytes == 9
    await again.execute_update(names.UPDATE_DELETE_FILE)


async def test_a_call_that_stalls_ends_like_one_whose_client_has_ended(stack: Stack) -> None:
    process = stack.add("gateway", {"GATEWAY_UPLOAD_STALL_TIMEOUT": "PT1S", "GATEWAY_MAX_UPLOADS": "1"})
    await process.start()
    await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(process.name)) as channel:
        stub = FileServiceStub(channel)
        silent = OpenUpload(stub)
        assert await bad_fields(silent.call) == {""}
        key = new_file()
        stalled = OpenUpload(stub)
        stalled.send(**key, data=b"abc")
        response: file_pb2.UploadFileResponse = await stalled.call
        assert (response.file.state, response.file.committed_bytes) == (file_pb2.FILE_STATE_UPLOADING, 3)
        assert (await upload(stub, key, b"abcdef", 3)).state == file_pb2.FILE_STATE_READY, "its place is free"
        slow = OpenUpload(stub)
        slow.send(**new_file(), data=b"a")
        sent = 1
        async with asyncio.timeout(PATIENCE):
            while not slow.call.done():
                slow.send(offset=sent, data=b"a")
                sent += 1
                await asyncio.sleep(0.2)  # less than the time, and without an end
        assert (await upload(stub, new_file(), b"abc")).state == file_pb2.FILE_STATE_READY, "its place is free"
    await process.terminate()


async def test_a_repeat_may_come_after_the_time_that_the_upload_asked_for(files: FileServiceStub) -> None:
    key = new_file()
    soon = datetime.now(UTC) + timedelta(seconds=5)
    key["file"].expire_time.FromDatetime(soon)
    file = await upload(files, key, b"abc")
    assert file.expire_time.ToDatetime(UTC) - soon > timedelta(seconds=30), "raised to a minute"
    key["file"].expire_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
    assert await upload(files, key, b"abc") == file
    another = new_file()
    another["file"].expire_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
    assert await bad_fields(upload(files, another, b"abc")) == {"file.expire_time"}
