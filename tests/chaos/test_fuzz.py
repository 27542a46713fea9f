"""A short run of `make fuzz`: no generated call makes a server fail."""

from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.support.fuzz import fuzz
from tests.support.fuzz_calls import Calls
from tests.support.stacks import FAST, stack_settings

SEED = 1
CALLS = 10_000
SECONDS = 800


@pytest.mark.timeout(SECONDS + 100)
async def test_ten_thousand_calls_find_no_fault(tmp_path: Path) -> None:
    """The calls are the same in each run, so the change under test causes a failure. `make fuzz` sends others."""
    async with Stack(stack_settings(tmp_path), environment=FAST) as stack:
        report = await fuzz(stack, SEED, CALLS, SECONDS)
    assert not report.problems, report
    assert report.codes["OK"] > CALLS / 10


def test_a_seed_gives_the_same_calls() -> None:
    assert [Calls(7, 20).call(number) for number in range(50)] == [Calls(7, 20).call(number) for number in range(50)]
