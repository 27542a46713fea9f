"""Items that wait while a group is committed form the next one."""

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar

import pytest

from runtime.group_commit import CommitError, GroupCommit, TooManyWaitingError


class Store:
    """Commits a group when the test lets it."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.may_end = asyncio.Semaphore(0)
        self.begun = asyncio.Semaphore(0)
        self.fails = False

    async def commit(self, items: Sequence[int]) -> list[int]:
        self.groups.append([*items])
        self.begun.release()
        await self.may_end.acquire()
        if self.fails:
            raise OSError("no disk")
        return [item * 10 for item in items]


def new_groups(store: Store, max_group: int = 100, max_waiting: int = 100) -> GroupCommit[int, int]:
    return GroupCommit(store.commit, max_group=max_group, max_waiting=max_waiting)


async def begin(groups: GroupCommit[int, int], store: Store, items: Sequence[int]) -> list[asyncio.Task[int]]:
    """Add the first item, and the others once it is being committed."""
    tasks = [asyncio.create_task(groups.add(items[0]))]
    await store.begun.acquire()
    tasks += [asyncio.create_task(groups.add(item)) for item in items[1:]]
    await asyncio.sleep(0)
    return tasks


async def test_one_group_at_a_time() -> None:
    store = Store()
    tasks = await begin(new_groups(store, max_group=3), store, range(1, 6))
    assert store.groups == [[1]]
    for _ in range(3):
        store.may_end.release()
    assert await asyncio.gather(*tasks) == [10, 20, 30, 40, 50]
    assert store.groups == [[1], [2, 3, 4], [5]]


async def test_who_leaves_while_waiting_is_not_committed() -> None:
    store = Store()
    tasks = await begin(new_groups(store), store, [1, 2, 3])
    tasks[0].cancel()
    tasks[1].cancel()
    store.may_end.release()
    store.may_end.release()
    assert await tasks[2] == 30
    assert store.groups == [[1], [3]]


async def test_a_failure_reaches_its_own_group_alone() -> None:
    store = Store()
    groups = new_groups(store)
    store.fails = True
    (task,) = await begin(groups, store, [1])
    store.may_end.release()
    with pytest.raises(CommitError, match="OSError: no disk"):
        await task
    store.fails = False
    store.may_end.release()
    assert await groups.add(2) == 20


async def test_so_many_may_wait() -> None:
    store = Store()
    groups = new_groups(store, max_waiting=2)
    tasks = await begin(groups, store, [1, 2, 3])
    with pytest.raises(TooManyWaitingError):
        await groups.add(4)
    store.may_end.release()
    store.may_end.release()
    assert await asyncio.gather(*tasks) == [10, 20, 30]


async def test_a_group_is_committed_for_nobody_in_particular() -> None:
    """The context of the first caller, a trace for example, is not that of the group."""
    caller: ContextVar[str] = ContextVar("caller", default="nobody")

    async def commit(items: Sequence[int]) -> list[str]:
        return [caller.get() for _ in items]

    caller.set("somebody")
    assert await GroupCommit(commit, max_group=1, max_waiting=1).add(1) == "nobody"
