"""Files by FileService: uploaded, read from any offset, listed, deleted, and what is refused."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from temporalio.client import Client, WorkflowUpdateFailedError
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import file_id, file_workflow_id
from jobs.memo import to_memo
from llm_pb import common_pb2, file_pb2, internal_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.support.files import (
    OpenUpload,
    bad_fields,
    content,
    delete,
    download,
    get,
    listed,
    messages,
    new_file,
    objects,
    refusal,
    sha256,
    until,
    until_committed,
    until_gone,
    upload,
    upload_again,
)
from tests.support.jobs import details_of

MIB = 1024 * 1024


@pytest.fixture(scope="session")
async def files(stack: Stack) -> AsyncIterator[FileServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield FileServiceStub(channel)


@pytest.mark.parametrize("size", [0, 1, 3 * MIB, 11 * MIB + 7])
async def test_a_file_comes_back_byte_for_byte_from_any_offset(files: FileServiceStub, size: int) -> None:
    key, sent = new_file(file={"ref": {"media_type": "text/plain"}}), content(size)
    before = datetime.now(UTC)
    file = await upload(files, key, sent)
    assert file.state == file_pb2.FILE_STATE_READY
    assert (file.ref.size_bytes, file.committed_bytes, file.ref.sha256) == (size, size, sha256(sent))
    assert (file.filename, file.purpose, file.ref.media_type) == ("notes.txt", "user_data", "text/plain")
    assert file.user_id == key["file"].user_id
    life = file.expire_time.ToDatetime(UTC) - before
    assert timedelta(days=29) < life < timedelta(days=31)
    assert await get(files, file.ref.file_id) == file
    assert await download(files, file.ref.file_id) == sent
    for offset in {0, size // 2, max(size - 1, 0), size}:
        assert await download(files, file.ref.file_id, offset) == sent[offset:]
        assert await download(files, file.ref.file_id, offset, 1000) == sent[offset : offset + 1000]
    assert await bad_fields(download(files, file.ref.file_id, size + 1)) == {"offset"}


async def test_an_upload_goes_on_where_it_broke_off(files: FileServiceStub) -> None:
    key, sent = new_file(), content(9 * MIB)
    file = await upload(files, key, sent[: 2 * MIB], last=False)
    assert (file.state, file.committed_bytes) == (file_pb2.FILE_STATE_UPLOADING, 2 * MIB)
    assert await get(files, file.ref.file_id) == file
    assert await refusal(download(files, file.ref.file_id)) == ("FAILED_PRECONDITION", "FILE_NOT_READY")
    for offset in (0, MIB, 3 * MIB):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await upload(files, key, sent, offset)
        assert error.value.code() == grpc.StatusCode.OUT_OF_RANGE
        assert details_of(error.value)["ErrorInfo"].metadata["committed_bytes"] == str(2 * MIB)
    file = await upload(files, key, sent, 2 * MIB)
    assert file.ref.sha256 == sha256(sent)
    assert await download(files, file.ref.file_id) == sent


async def test_a_file_without_last_is_never_ready(files: FileServiceStub) -> None:
    key = new_file()
    file = await upload(files, key, b"abc", last=False)
    assert file.state == file_pb2.FILE_STATE_UPLOADING
    file = await upload(files, key, b"abc", 3)
    assert (file.state, file.ref.sha256) == (file_pb2.FILE_STATE_READY, sha256(b"abc"))


async def test_a_repeated_upload_finds_the_file_and_another_one_is_refused(files: FileServiceStub) -> None:
    key = new_file()
    file = await upload(files, key, b"content")
    assert await upload(files, key, b"content") == file
    other = {**key, "file": file_pb2.File()}
    other["file"].CopyFrom(key["file"])
    other["file"].filename = "other.txt"
    assert await refusal(upload(files, other, b"content")) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def test_a_stalled_upload_keeps_what_it_sent(files: FileServiceStub) -> None:
    """Without the end of the message that would fill a segment."""
    key = new_file()
    stalled = OpenUpload(files)
    stalled.send(**key, data=b"abc")
    id_ = file_id(key["file"].user_id, key["request_id"], "")
    assert await until_committed(files, id_, 3) == 3
    stalled.call.cancel()
    assert (await upload(files, key, b"abcdef", 3)).ref.sha256 == sha256(b"abcdef")


async def test_of_two_uploads_of_one_file_one_wins(files: FileServiceStub) -> None:
    key = new_file()
    slow = OpenUpload(files)
    slow.send(**key, data=b"abc")
    await until_committed(files, file_id(key["file"].user_id, key["request_id"], ""), 3)
    file = await upload(files, key, b"abc123", 3)
    slow.send(offset=3, data=b"xyz", last=True)
    assert await refusal(slow.call) == ("ABORTED", "UPLOAD_OVERTAKEN")
    assert await download(files, file.ref.file_id) == b"abc123"


async def test_many_uploads_of_one_file_at_once_end_with_one_content(files: FileServiceStub) -> None:
    key, sent = new_file(), content(5 * MIB)
    answers = await asyncio.gather(*(upload(files, key, sent) for _ in range(4)), return_exceptions=True)
    ready = [answer for answer in answers if isinstance(answer, file_pb2.File)]
    assert ready
    codes = {answer.code().name for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
    assert codes <= {"ABORTED", "OUT_OF_RANGE"}, answers
    assert await download(files, ready[0].ref.file_id) == sent


@pytest.mark.parametrize(
    ("ref", "field"),
    [
        ({"size_bytes": 5}, "file.ref.size_bytes"),
        ({"size_bytes": 7}, "file.ref.size_bytes"),
        ({"sha256": bytes(32)}, "file.ref.sha256"),
    ],
)
async def test_a_content_that_is_not_what_was_declared_is_refused_and_gone(
    files: FileServiceStub, stack: Stack, ref: dict[str, object], field: str
) -> None:
    key = new_file(file={"ref": common_pb2.FileRef(**ref)})  # type: ignore[arg-type]
    assert await bad_fields(upload(files, key, b"123456")) == {field}
    if ref != {"size_bytes": 5}:
        await until_gone(files, file_id(key["file"].user_id, key["request_id"], ""))
    key["file"].ref.Clear()
    key["file"].ref.size_bytes, key["file"].ref.sha256 = 6, sha256(b"123456")
    if ref != {"size_bytes": 5}:
        assert (await upload_again(files, key, b"123456")).state == file_pb2.FILE_STATE_READY


async def test_a_deleted_file_is_gone_with_its_objects_and_its_key_is_free(
    files: FileServiceStub, stack: Stack
) -> None:
    key = new_file()
    file = await upload(files, key, b"content")
    mine = {path for path in objects(stack.state_dir / "store") if file.ref.file_id in str(path)}
    assert mine
    await delete(files, file.ref.file_id)
    for call in (get, download, delete):
        assert await refusal(call(files, file.ref.file_id)) == ("NOT_FOUND", "FILE_NOT_FOUND")
    await until(lambda: not any(path.exists() for path in mine))
    again = await upload_again(files, key, b"other")
    assert await download(files, again.ref.file_id) == b"other"


async def test_files_are_listed_by_user_and_purpose_in_pages(files: FileServiceStub) -> None:
    keys = [new_file(file={"user_id": "file-lister", "purpose": purpose}) for purpose in ("batch", "vision", "batch")]
    sent = [await upload(files, key, b"1") for key in keys]

    seen: list[list[file_pb2.File]] = []

    async def are_listed(number: int) -> bool:
        seen.append(await listed(files, user_id="file-lister"))
        return len(seen[-1]) == number

    try:
        await until(lambda: are_listed(3))
    except TimeoutError:
        pytest.fail(f"listed at last: {seen[-1]}, uploaded: {sent}")
    assert await listed(files, user_id="file-lister", page_size=1) == sent[::-1]
    assert await listed(files, user_id="file-lister", purpose="batch") == [sent[2], sent[0]]
    assert await listed(files, user_id="nobody") == []
    page = await files.ListFiles(file_pb2.ListFilesRequest(user_id="file-lister", page_size=1))
    request = file_pb2.ListFilesRequest(user_id="other", page_token=page.next_page_token)
    assert await bad_fields(files.ListFiles(request)) == {"page_token"}
    await delete(files, sent[1].ref.file_id)
    await until(lambda: are_listed(2))
    assert await listed(files, user_id="file-lister") == [sent[2], sent[0]]


async def test_a_message_that_does_not_continue_ends_the_upload(files: FileServiceStub) -> None:
    for later, field in (
        ({"offset": 4, "data": b"x"}, "offset"),
        ({"offset": 3, "data": b"x", "request_id": "again"}, "request_id"),
        ({"offset": 3, "data": bytes(MIB + 1)}, "data"),
    ):
        broken = OpenUpload(files)
        broken.send(**new_file(), data=b"abc")
        broken.send(**later)
        assert await bad_fields(broken.call) == {field}


async def test_an_upload_that_says_nothing_of_its_file_is_refused(files: FileServiceStub) -> None:
    nothing = OpenUpload(files)
    nothing.send(data=b"abc", last=True)
    assert await bad_fields(nothing.call) == {"file"}
    empty = OpenUpload(files)
    empty.end()
    with pytest.raises(grpc.aio.AioRpcError, match="without a request"):
        await empty.call
    assert [*messages(new_file(), b"")]


async def test_the_record_of_a_file_goes_on_in_new_runs(files: FileServiceStub, temporal: Client) -> None:
    """Temporal takes 2,000 updates of a run, and a slow upload commits every five seconds."""
    file = file_pb2.File(user_id="long", state=file_pb2.FILE_STATE_UPLOADING)
    file.ref.file_id = id_ = file_id("long", "runs", "")
    file.expire_time.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    record = internal_pb2.FileRecord(file=file, max_updates=2)
    handle = await temporal.start_workflow(
        names.FILE_WORKFLOW_TYPE,
        record,
        id=file_workflow_id(id_, ""),
        task_queue=names.WORKFLOW_QUEUE,
        memo={names.MEMO_FILE: to_memo(file), names.MEMO_FILE_DIGEST: "digest"},
        search_attributes=TypedSearchAttributes([SearchAttributePair(names.USER_ID, "long")]),
    )
    runs = set()
    for number in range(7):
        commit = internal_pb2.CommitSegmentRequest(offset=number)
        commit.segment.name, commit.segment.size = f"segment-{number}", 1
        for _ in range(2):
            # The second time nothing happens: an answer may be lost.
            while True:
                try:
                    await handle.execute_update(names.UPDATE_COMMIT_SEGMENT, commit)
                    break
                except WorkflowUpdateFailedError:
                    await asyncio.sleep(0.05)
        description = await handle.describe()
        assert description.typed_search_attributes[names.USER_ID] == "long"
        assert await description.memo_value(names.MEMO_FILE_DIGEST) == "digest"
        runs.add(description.run_id)
        assert (await get(files, id_)).committed_bytes == number + 1
    assert len(runs) > 1
    known = await handle.query(names.QUERY_GET_RECORD, result_type=internal_pb2.FileRecord)
    assert [segment.name for segment in known.segments] == [f"segment-{number}" for number in range(7)]
    await delete(files, id_)
    await handle.result()


async def test_without_a_store_there_are_no_files(stack: Stack) -> None:
    process = stack.add("gateway", {"STORE_URL": ""})
    await process.start()
    await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(process.name)) as channel:
        stub = FileServiceStub(channel)
        disabled = ("FAILED_PRECONDITION", "FILES_DISABLED")
        id_ = f"file-{'0' * 64}"
        for call in (upload(stub, new_file(), b"1"), download(stub, id_), delete(stub, id_)):
            assert await refusal(call) == disabled
        assert await refusal(get(stub, id_)) == ("NOT_FOUND", "FILE_NOT_FOUND")
    await process.terminate()


async def test_a_file_expires_when_it_asks_for_it(stack: Stack, tmp_path: Path) -> None:
    process = stack.add("gateway", {"GATEWAY_FILE_TTL": "PT3S", "GATEWAY_FILE_UPLOAD_TTL": "PT3S"})
    await process.start()
    await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(process.name)) as channel:
        stub = FileServiceStub(channel)
        ready = await upload(stub, new_file(), b"content")
        broken = await upload(stub, new_file(), b"content", last=False)
        for file in (ready, broken):
            await until_gone(stub, file.ref.file_id)
        await until(lambda: not any(ready.ref.file_id in str(path) for path in objects(stack.state_dir / "store")))
    await process.terminate()
