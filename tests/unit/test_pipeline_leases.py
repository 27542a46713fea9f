"""The output tokens that a pipeline leases: see pipelines.token_leases."""

import asyncio
from collections.abc import Callable

from llm_pb import internal_pb2
from pipelines.token_leases import TokenLeases

LIMIT = 100


async def test_a_step_that_waits_takes_what_another_one_gives_back() -> None:
    """Two steps may use 60 of 100 each. The first one uses 5, and the second one does not wait for the next day."""
    used, asked, changed = 0, list[internal_pb2.LeaseRequest](), asyncio.Event()

    async def ledger(ask: Callable[[], internal_pb2.LeaseRequest]) -> internal_pb2.LeaseResponse:
        """Answer as the ledger does where nobody else has a slot, and ask again as soon as something has changed."""
        while True:
            asked.append(request := ask())
            if request.used_tokens + request.held_tokens + request.least_tokens <= LIMIT:
                return internal_pb2.LeaseResponse(leased_tokens=request.least_tokens)
            await changed.wait()
            changed.clear()

    options = internal_pb2.PipelineOptions(leased_a_day=LIMIT)
    leases = TokenLeases("llmpipe-user-request", options, lambda: used, ledger)
    await leases.take("first", 60)
    second = asyncio.create_task(leases.take("second", 60))
    await asyncio.sleep(0)
    assert (asked[-1].held_tokens, asked[-1].alone) == (60, False)
    used = 5
    leases.release("first")
    changed.set()
    async with asyncio.timeout(5):
        await second
    assert (asked[-1].used_tokens, asked[-1].held_tokens, asked[-1].alone) == (5, 0, True)
