"""Batches of any length: few files are open at a time while their segments are merged."""

from io import BytesIO
from tempfile import TemporaryFile

import pytest

from batches.segments import DamagedSegment, merge, read_segment, to_segment
from llm_pb import batch_pb2
from services.gateway.batches.merging import Runs


def segment(*indexes: int) -> BytesIO:
    file = TemporaryFile()  # noqa: SIM115  # Runs closes it
    file.write(to_segment([batch_pb2.BatchItem(index=index) for index in indexes]))
    file.seek(0)
    return file  # type: ignore[return-value]


async def test_many_segments_become_few_files() -> None:
    with Runs(at_once=4) as runs:
        for number in range(500):
            await runs.add(segment(number, 999 - number))
            assert len(runs.files) <= 3 * 5
        items = [*merge([read_segment(file) for file in runs.files])]
        files = runs.files
    assert [item.index for item in items] == list(range(1000))
    assert all(file.closed for file in files)


async def test_a_line_with_two_results_is_found_in_whatever_run_they_are() -> None:
    with Runs(at_once=2) as runs:
        await runs.add(segment(1, 2))
        with pytest.raises(DamagedSegment):
            await runs.add(segment(2, 3))
