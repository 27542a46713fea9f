"""A step whose workflow is just being started, and its cancel."""

import asyncio

import pytest

from pipelines.children import _Noting
from pipelines.errors import StepFailed, failing_as


async def started() -> str:
    """Wait as the SDK does for the start of a child: a cancel becomes the child's, and its task forgets it."""
    try:
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        await asyncio.sleep(0)
    return "child"


@pytest.mark.parametrize("ends_well", [True, False])
async def test_a_cancel_ends_a_step_whose_workflow_is_just_being_started(ends_well: bool) -> None:
    """The step went on as if nobody had cancelled it, and the fan-out with its next item."""

    async def step() -> None:
        starting = _Noting(started())
        async with failing_as("write", lambda: starting.cancelled):
            assert await starting == "child"
            if not ends_well:
                # As the error of a child that was cancelled.
                raise asyncio.CancelledError

    task = asyncio.create_task(step())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_start_that_fails_fails_its_step() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("scripted")

    starting = _Noting(fail())
    with pytest.raises(StepFailed, match="scripted"):
        async with failing_as("write", lambda: starting.cancelled):
            await starting
    assert not starting.cancelled
