"""Calls that are shared: how old a result may be, and what becomes of an error and of a cancelled caller."""

import asyncio

import pytest

from runtime.shared_calls import SharedCalls


class Server:
    """Answers each call with the number of calls that had begun before it ends, when it is let."""

    def __init__(self) -> None:
        self.calls = 0
        self.may_answer = asyncio.Semaphore(0)
        self.error: Exception | None = None

    async def call(self) -> int:
        self.calls += 1
        number = self.calls
        await self.may_answer.acquire()
        if self.error is not None:
            raise self.error
        return number


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_fresh_result_is_not_older_than_the_request() -> None:
    """All who ask during a call share the next one."""
    shared, server = SharedCalls(), Server()
    first = [asyncio.create_task(shared.fresh("a", server.call)) for _ in range(3)]
    await settle()
    later = [asyncio.create_task(shared.fresh("a", server.call)) for _ in range(100)]
    other = asyncio.create_task(shared.fresh("b", server.call))
    await settle()
    assert server.calls == 2, "another key must not wait"
    for _ in range(3):
        server.may_answer.release()
    assert await asyncio.gather(*first) == [1] * 3
    assert await other == 2
    assert await asyncio.gather(*later) == [3] * 100


async def test_a_joined_result_is_that_of_the_running_call() -> None:
    shared, server = SharedCalls(), Server()
    joined = [asyncio.create_task(shared.joined("a", server.call)) for _ in range(3)]
    await settle()
    joined.append(asyncio.create_task(shared.joined("a", server.call)))
    await settle()
    server.may_answer.release()
    assert await asyncio.gather(*joined) == [1] * 4
    server.may_answer.release()
    assert await shared.joined("a", server.call) == 2


@pytest.mark.parametrize("way", ["fresh", "joined"])
async def test_an_error_is_everybodys_and_passes(way: str) -> None:
    shared, server = SharedCalls(), Server()
    server.error = ValueError("no")
    asking = [asyncio.create_task(getattr(shared, way)("a", server.call)) for _ in range(3)]
    await settle()
    server.may_answer.release()
    assert [str(error) for error in await asyncio.gather(*asking, return_exceptions=True)] == ["no"] * 3
    server.error = None
    server.may_answer.release()
    assert await getattr(shared, way)("a", server.call) == 2


@pytest.mark.parametrize("way", ["fresh", "joined"])
async def test_who_leaves_takes_the_result_from_nobody(way: str) -> None:
    shared, server = SharedCalls(), Server()
    leaving, staying = (asyncio.create_task(getattr(shared, way)("a", server.call)) for _ in range(2))
    await settle()
    leaving.cancel()
    await asyncio.wait([leaving])
    server.may_answer.release()
    assert await staying == 1
