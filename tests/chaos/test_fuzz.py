"""A short run of `make fuzz`: no generated call makes a server fail."""

from pathlib import Path

import pytest

from tests.support.fuzz import fuzz, fuzzed_stack
from tests.support.fuzz_calls import Calls

SEED = 1
CALLS = 5_000
SECONDS = 800


@pytest.mark.timeout(SECONDS + 100)
@pytest.mark.parametrize("credentials", [False, True], ids=["anonymous", "credentials"])
async def test_thousands_of_calls_find_no_fault(tmp_path: Path, credentials: bool) -> None:
    """The calls are the same in each run, so the change under test causes a failure. `make fuzz` sends others."""
    async with fuzzed_stack(tmp_path, credentials=credentials) as (stack, keys):
        report = await fuzz(stack, keys, SEED, CALLS, SECONDS)
    assert not report.problems, report
    assert report.codes["OK"] > CALLS / 10


@pytest.mark.parametrize("credentials", [False, True])
def test_a_seed_gives_the_same_calls(credentials: bool) -> None:
    first, second = (Calls(7, 20, credentials=credentials) for _ in range(2))
    assert [first.call(number) for number in range(50)] == [second.call(number) for number in range(50)]
