"""Tasks that run concurrently with the main work of a process."""

import asyncio

import pytest

from runtime.background import beside


async def test_they_end_with_the_body() -> None:
    cancelled: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(number)
            raise

    async with beside(work(1), work(2)):
        await asyncio.sleep(0)
    assert cancelled == [1, 2]


async def test_one_that_fails_ends_the_body() -> None:
    async def fail() -> None:
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        async with beside(fail(), asyncio.Event().wait()):  # type: ignore[arg-type]
            await asyncio.Event().wait()


async def test_an_error_of_the_body_comes_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="address in use") as raised:
        async with beside(asyncio.Event().wait()):  # type: ignore[arg-type]
            raise RuntimeError("address in use") from OSError("of the system")
    assert isinstance(raised.value.__cause__, OSError)
