"""Lines of batches whose prompts are files."""

import base64
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import batch_pb2, common_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.support.batches import Stubs, by_index, create
from tests.support.files import delete, new_file, upload
from tests.support.jobs import unpack

TEXT = "Grüße, 世界 🙂"


@pytest.fixture
async def stubs(stack: Stack) -> AsyncIterator[Stubs]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield Stubs(FileServiceStub(channel), BatchServiceStub(channel))


def line(number: int, ref: common_pb2.FileRef | None = None, model: str = "docstrings", **more: Any) -> dict[str, Any]:
    prompt = {"prompt_file": {"file_id": ref.file_id, **more}} if ref is not None else {"prompt": TEXT}
    return {"request_id": f"line-{number}", "model": model, "params": {"max_tokens": 20}, **prompt}


async def test_a_file_is_read_as_a_prompt_is(stubs: Stubs) -> None:
    ref = (await upload(stubs.files, new_file(file={"user_id": "reader"}), TEXT.encode())).ref
    digest = base64.b64encode(ref.sha256).decode()
    lines = [line(0), line(1, ref), line(2, ref, sha256=digest), {**line(3, ref), "watch": True}]
    status = await stubs.end((await create(stubs, lines, "reader")).batch_id)
    assert status.state == batch_pb2.BATCH_STATE_SUCCEEDED, status
    outputs = {item["result"]["output"] for item in await stubs.read(status.output)}
    assert len(outputs) == 1
    assert status.counts.succeeded == 4


async def test_a_file_that_cannot_be_the_prompt_makes_a_bad_line(stubs: Stubs) -> None:
    owner = {"user_id": "reader"}
    own = (await upload(stubs.files, new_file(file=owner), TEXT.encode())).ref
    others = (await upload(stubs.files, new_file(file={"user_id": "other"}), TEXT.encode())).ref
    binary = (await upload(stubs.files, new_file(file=owner), b"a\xff")).ref
    gone = common_pb2.FileRef(file_id=f"file-{'0' * 64}")
    lines = [line(0, own), line(1, others), line(2, binary), line(3, gone), line(4, own, size_bytes="1")]
    status = await stubs.end((await create(stubs, lines, "reader")).batch_id)
    assert status.state == batch_pb2.BATCH_STATE_FAILED
    fields = [violation.field for violation in unpack(status.error)["BadRequest"].field_violations]
    assert fields == [
        "lines[1].prompt_file.file_id",
        "lines[2].prompt_file",
        "lines[3].prompt_file.file_id",
        "lines[4].prompt_file.size_bytes",
    ]


async def test_an_item_whose_file_is_gone_fails_alone(stubs: Stubs) -> None:
    ref = (await upload(stubs.files, new_file(file={"user_id": "reader"}), TEXT.encode())).ref
    # A single item runs at a time, and the first one long enough for the file to go.
    lines = [{**line(0), "params": {"max_tokens": 1000}}, {**line(1, ref), "priority": 5}]
    created = await create(stubs, lines, "reader", max_concurrent=1)
    async for message in stubs.batches.StreamBatch(batch_pb2.StreamBatchRequest(batch_id=created.batch_id)):
        if message.status.state != batch_pb2.BATCH_STATE_VALIDATING:
            break
    await delete(stubs.files, ref.file_id)
    status = await stubs.end(created.batch_id)
    assert (status.counts.succeeded, status.counts.failed) == (1, 1)
    items = by_index(await stubs.results(status.batch_id))
    assert unpack(items[1].error)["ErrorInfo"].reason == "PROMPT_FILE_MISSING"
