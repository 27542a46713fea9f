"""Group commit: while one group of items is being committed, those that arrive wait and form the next group."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class CommitError(Exception):
    """The group of an item was not committed, as far as is known. The cause is in the message."""


class TooManyWaitingError(Exception):
    """The maximum number of items waits already."""


class GroupCommit(Generic[T, R]):
    """Commits items in groups, one group at a time."""

    def __init__(
        self, commit: Callable[[Sequence[T]], Awaitable[Sequence[R]]], *, max_group: int, max_waiting: int
    ) -> None:
        """`commit` returns a result for each item of a group, in their order."""
        self._commit = commit
        self._max_group = max_group
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._committing: asyncio.Task[None] | None = None

    async def add(self, item: T) -> R:
        """Commit the item with the next group; return its result. Raises CommitError, TooManyWaitingError.

        An item whose caller is cancelled while it waits is not committed. Once its group is under way, it is.
        """
        if len(self._waiting) >= self._max_waiting:
            raise TooManyWaitingError
        result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        if self._committing is None:
            # Not in the context of this caller: its trace and identity are not those of the next ones.
            self._committing = asyncio.create_task(self._commit_all(), context=Context())
        return await result

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                taken = [self._waiting.popleft() for _ in range(min(self._max_group, len(self._waiting)))]
                if group := [(item, result) for item, result in taken if not result.done()]:
                    await self._commit_group(group)
        finally:
            self._committing = None

    async def _commit_group(self, group: Sequence[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._commit([item for item, _ in group])
        except Exception as error:  # noqa: BLE001  # whatever it was, those who wait have to learn of it
            for _, result in group:
                if not result.done():
                    # One each: an exception that is raised in many tasks keeps the frames of all of them.
                    result.set_exception(CommitError(f"{type(error).__name__}: {error}"))
            return
        for (_, result), value in zip(group, results, strict=True):
            if not result.done():
                result.set_result(value)
