"""How the data of an upload are cut into segments."""

from collections.abc import AsyncGenerator

import pytest

from llm_pb import file_pb2
from services.gateway.files.incoming import Incoming

MIB = 1024 * 1024
MAX_SEGMENTS = 8192
MAX_FILE_BYTES = 1 << 40


async def _requests(count: int) -> AsyncGenerator[file_pb2.UploadFileRequest, None]:
    for number in range(1, count):
        yield file_pb2.UploadFileRequest(offset=number * MIB, data=bytes(MIB))


@pytest.mark.parametrize(("before", "mebibytes"), [(0, 4), (127, 4), (128, 8), (256, 12), (8191, 256)])
async def test_a_segment_is_the_larger_the_more_the_file_has(before: int, mebibytes: int) -> None:
    first = file_pb2.UploadFileRequest(data=bytes(MIB))
    incoming = Incoming(first, _requests(mebibytes + 3))
    assert await incoming.begin_segment()
    assert sum([len(data) async for data in incoming.segment(before)]) == mebibytes * MIB
    await incoming.close()


def test_the_largest_file_fits_into_its_segments() -> None:
    assert sum((1 + number // 128) * 4 * MIB for number in range(MAX_SEGMENTS)) >= MAX_FILE_BYTES
