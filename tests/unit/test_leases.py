"""The budget of a batch: what its chunks hold of it, and what their items reserve."""

import asyncio
from datetime import timedelta

import pytest

from batches.grants import Grant
from jobs.batches import BUDGET_SPENT, batch_error
from jobs.leases import Lease, Leases, Spent
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2

GROUP = internal_pb2.PlanGroup(default_max_tokens=10)
"""Its chunks want 160 output tokens at least."""
NOTHING = internal_pb2.ChunkResult()


def used(tokens: int) -> common_pb2.Usage:
    return common_pb2.Usage(output_tokens=tokens)


def has_used(tokens: int, needed: int = 0) -> internal_pb2.ChunkResult:
    result = internal_pb2.ChunkResult(usage=used(tokens))
    if needed:
        result.needed.output_tokens = needed
    return result


def granted(lease: Lease | Spent | None) -> tuple[int, bool]:
    assert isinstance(lease, Lease)
    return lease.grant.output_tokens, lease.last


def test_chunks_share_a_budget_and_return_what_they_do_not_use() -> None:
    leases = Leases(common_pb2.Budget(output_tokens=10_000), shares=10)
    assert granted(leases.lease(0, GROUP, used(0), NOTHING)) == (1000, False)
    assert granted(leases.lease(1, GROUP, used(0), NOTHING)) == (900, False)
    leases.settle(0, used(100))
    leases.drop(0)
    # 100 are used, 900 are held.
    assert granted(leases.lease(2, GROUP, used(100), NOTHING)) == (900, False)


def test_a_chunk_that_goes_on_has_what_it_has_used_and_what_it_needs() -> None:
    leases = Leases(common_pb2.Budget(output_tokens=10_000), shares=10)
    leases.lease(0, GROUP, used(0), NOTHING)
    result = has_used(990, needed=4990)
    leases.settle(0, result.usage)
    assert granted(leases.lease(0, GROUP, used(0), result)) == (4990, False)
    # A chunk whose worker was lost has no other grant than before, by what is durable.
    leases.settle(0, used(995))
    grant, _ = granted(leases.lease(0, GROUP, used(0), has_used(995)))
    assert 995 < grant <= 10_000


def test_a_batch_without_a_budget_leases_what_its_chunks_lack() -> None:
    leases = Leases(common_pb2.Budget(), shares=2, leased_tokens=0)
    assert leases.lease(0, GROUP, used(0), NOTHING) is None
    assert leases.lacking == 1
    leases.grow(100)
    assert granted(leases.lease(0, GROUP, used(0), NOTHING)) == (50, False)
    # It has used 40 and says that its next item may need 30.
    leases.settle(0, used(40))
    assert granted(leases.lease(1, GROUP, used(0), NOTHING)) == (30, False)
    assert granted(leases.lease(0, GROUP, used(0), has_used(40, needed=70))) == (70, False)
    # Nothing is left, and the chunk of another one does not wait for what others may return.
    leases.settle(0, used(70))
    assert leases.lease(0, GROUP, used(0), has_used(70, needed=100)) is None
    assert leases.lacking == 30
    leases.grow(30)
    assert granted(leases.lease(0, GROUP, used(0), has_used(70, needed=100))) == (100, False)


def test_the_last_one_has_all_that_is_left_once_nobody_else_runs() -> None:
    leases = Leases(common_pb2.Budget(output_tokens=1000), shares=2)
    assert granted(leases.lease(0, GROUP, used(0), NOTHING)) == (500, False)
    assert granted(leases.lease(1, GROUP, used(0), NOTHING)) == (250, False)
    assert leases.lease(2, GROUP, used(0), has_used(0, needed=300)) is None
    leases.settle(0, used(500))
    leases.drop(0)
    assert leases.lease(2, GROUP, used(500), has_used(0, needed=300)) is None
    leases.settle(1, used(249))
    leases.drop(1)
    assert granted(leases.lease(2, GROUP, used(749), has_used(0, needed=300))) == (251, True)
    leases.settle(2, used(251))
    assert leases.lease(2, GROUP, used(749), has_used(251, needed=252)) == Spent("output_tokens")


def test_a_batch_without_a_budget_has_no_leases() -> None:
    leases = Leases(common_pb2.Budget(), shares=2)
    assert leases.lease(0, GROUP, used(0), NOTHING) == Lease(common_pb2.Budget(), last=False)
    assert not leases.limited


def new_grant(*, last: bool = False, price: int = 0, **limits: int) -> Grant:
    request = internal_pb2.ChunkRequest(grant=common_pb2.Budget(**limits), last_grant=last, default_max_tokens=10)
    if price:
        request.price.output_micros_per_million = price * 1_000_000
    return Grant(request, used(0), 99)


def job(tokens: int = 0) -> llm_pb2.JobRequest:
    found = llm_pb2.JobRequest(prompt="x")
    if tokens:
        found.params.max_tokens = tokens
    return found


async def test_items_begin_while_the_most_that_they_may_use_fits() -> None:
    grant = new_grant(output_tokens=25)
    assert await grant.reserve(0, job())
    assert await grant.reserve(1, job())
    third = asyncio.create_task(grant.reserve(2, job()))
    await asyncio.sleep(0)
    assert not third.done()
    grant.settle(0, batch_pb2.BatchItem(), used(5))
    grant.release(0)
    assert await third
    for place in (1, 2):
        grant.settle(place, batch_pb2.BatchItem(), used(10))
        grant.release(place)
    assert grant.needed is None
    assert not await grant.reserve(3, job())
    assert grant.needed is not None
    assert grant.needed.output_tokens == 35


def test_what_is_given_back_is_lacking() -> None:
    leases = Leases(common_pb2.Budget(), 4, leased_tokens=30)
    group, needs = internal_pb2.PlanGroup(), internal_pb2.ChunkResult(needed=common_pb2.Budget(output_tokens=50))
    assert leases.lease(0, group, used(20), needs) is None
    assert leases.lacking == 40
    leases.give_back(10)
    assert leases.lacking == 50
    leases.grow(50)
    assert leases.lease(0, group, used(20), needs) == Lease(common_pb2.Budget(output_tokens=50), last=False)


async def test_a_last_grant_bounds_the_item_that_it_does_not_suffice_for() -> None:
    grant, last = new_grant(output_tokens=25, last=True), job(30)
    assert await grant.reserve(0, last)
    assert last.budget.output_tokens == 25
    spent = batch_pb2.BatchItem(error=batch_error(8, BUDGET_SPENT, ""))
    grant.settle(0, spent, used(25))
    grant.release(0)
    assert not await grant.reserve(1, job(1))
    assert grant.needed == common_pb2.Budget(output_tokens=26)


async def test_a_budget_of_costs_is_reserved_by_the_price() -> None:
    grant = new_grant(cost_micros=25, price=2)
    assert await grant.reserve(0, job())
    second = asyncio.create_task(grant.reserve(1, job()))
    await asyncio.sleep(0)
    assert not second.done()
    grant.settle(0, batch_pb2.BatchItem(), common_pb2.Usage(cost_micros=20))
    grant.release(0)
    assert not await second
    assert grant.needed is not None
    assert grant.needed.cost_micros == 40


@pytest.mark.parametrize("last", [False, True])
async def test_the_time_of_a_grant_is_that_of_all_items(last: bool) -> None:
    request = internal_pb2.ChunkRequest(last_grant=last)
    request.grant.engine_time.FromSeconds(10)
    grant = Grant(request, common_pb2.Usage(), 10)
    for place in range(3):
        assert await grant.reserve(place, job())
    ended = common_pb2.Usage()
    ended.engine_time.FromSeconds(4)
    grant.settle(0, batch_pb2.BatchItem(), ended)
    # An item that has ended counts once, also before it is released.
    assert not grant.is_over({place: timedelta(seconds=2) for place in range(3)})
    assert grant.is_over({place: timedelta(seconds=3) for place in (1, 2)})
    assert grant.needed is not None
    assert grant.needed.engine_time.ToNanoseconds() == 10 * 10**9 + 1
    assert not await grant.reserve(3, job())
