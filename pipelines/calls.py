"""Many calls of one function, of which a limited number runs at the same time. An error of one cancels the others."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


async def call_each(
    call: Callable[[int, _T], Awaitable[_R]], items: Sequence[_T], limit: int, cancels_once: Callable[[], bool]
) -> list[_R]:
    """Call with each item and its number, in a task of its own, and return the results in the order of the items.

    `cancels_once` returns whether calls that were cancelled together are not cancelled again. Raises the error of the
    first call that fails.
    """
    turns = asyncio.Semaphore(limit)

    async def call_one(number: int, item: _T) -> _R:
        async with turns:
            return await call(number, item)

    return await _all_or_none((call_one(number, item) for number, item in enumerate(items)), cancels_once)


async def call_in_turn(
    call: Callable[[int, _T], Awaitable[_R]], items: Sequence[_T], limit: int, cancels_once: Callable[[], bool]
) -> list[_R]:
    """Return what call_each() returns, by `limit` tasks that take one item after the other.

    A workflow task would last too long that begins or cancels a task for each of thousands of items.
    """
    results: dict[int, _R] = {}
    left = iter(enumerate(items))

    async def call_next() -> None:
        for number, item in left:
            results[number] = await call(number, item)

    await _all_or_none((call_next() for _ in range(min(limit, len(items)))), cancels_once)
    return [results[number] for number in range(len(items))]


async def _all_or_none(coroutines: Iterable[Coroutine[Any, Any, _R]], cancels_once: Callable[[], bool]) -> list[_R]:
    """Run coroutines as tasks, and return their results. If one raises an error, cancel the others and raise it."""
    calls = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return [*await asyncio.gather(*calls)]
    finally:
        for task in calls:
            # Temporal would be asked once more to cancel each child.
            if not (cancels_once() and task.cancelling()):
                task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
