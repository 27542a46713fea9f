"""A batch of two thousand lines from the upload to its output, with the stack's own GPU worker."""

from collections.abc import AsyncIterator

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import batch_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.support.batches import Stubs, by_index, create, custom_id_of, lines_of

LINES = 2000
TOKENS = 8


@pytest.fixture
async def stubs(stack: Stack) -> AsyncIterator[Stubs]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield Stubs(FileServiceStub(channel), BatchServiceStub(channel))


@pytest.mark.long
async def test_two_thousand_lines_come_back_once_each(stubs: Stubs) -> None:
    lines = lines_of(LINES, "docstrings")
    defaults = llm_pb2.JobRequest(params=llm_pb2.SamplingParams(max_tokens=TOKENS))
    status = await stubs.end((await create(stubs, lines, defaults=defaults)).batch_id)
    assert status.state == batch_pb2.BATCH_STATE_SUCCEEDED, status
    assert (status.counts.total, status.counts.succeeded) == (LINES, LINES)
    assert status.usage.output_tokens == LINES * TOKENS
    output = await stubs.read(status.output)
    expected = [custom_id_of({"custom_id": line.get("custom_id", line.get("request_id"))}) for line in lines]
    assert [custom_id_of(line) for line in output] == expected
    items = by_index(await stubs.results(status.batch_id))
    assert len(items) == LINES
    assert items[0].result.output == output[0]["result"]["output"]
    assert items[1].result.output == output[1]["response"]["body"]["choices"][0]["message"]["content"]
