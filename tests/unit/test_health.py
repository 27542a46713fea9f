"""Readiness, asked of an event loop that does other things meanwhile."""

import asyncio

from runtime.health import Readiness


async def test_a_check_that_is_added_while_others_are_under_way_counts_the_next_time() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow() -> bool:
        asked.set()
        await answer.wait()
        return True

    readiness = Readiness("test")
    readiness.need("slow", "is slow", slow)
    with readiness.serving():
        asking = asyncio.create_task(asyncio.to_thread(readiness.readyz))
        await asked.wait()
        readiness.need("late", "is late", lambda: False)
        answer.set()
        assert (await asking)["ready"]
        assert (await asyncio.to_thread(readiness.readyz))["missing"] == {"late": "is late"}
