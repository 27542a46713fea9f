"""The pages of files in OpenAI's form: what a page says of the files after it."""

from collections.abc import AsyncGenerator

import pytest

from llm_pb import common_pb2, file_pb2
from openai_api.errors import InvalidBody
from services.http.openai.files import page_of

_SCANNED = 20_000


async def _files(count: int) -> AsyncGenerator[file_pb2.File, None]:
    for number in range(count):
        yield file_pb2.File(ref=common_pb2.FileRef(file_id=f"{number}"))


@pytest.mark.parametrize(
    ("count", "after", "limit", "last", "more"),
    [
        (3, "", 3, "2", False),
        (3, "", 2, "1", True),
        (3, "0", 2, "2", False),
        (_SCANNED, f"{_SCANNED - 2}", 10, f"{_SCANNED - 1}", False),
        (_SCANNED + 1, f"{_SCANNED - 2}", 10, f"{_SCANNED - 1}", True),
    ],
)
async def test_a_page_says_whether_there_are_more_files(
    count: int, after: str, limit: int, last: str, more: bool
) -> None:
    page = await page_of(_files(count), after, limit)
    assert (page.files[-1].ref.file_id, page.has_more) == (last, more)


async def test_a_file_that_is_not_found_is_refused() -> None:
    for count in (3, _SCANNED + 1):
        with pytest.raises(InvalidBody):
            await page_of(_files(count), f"{_SCANNED}", 10)
