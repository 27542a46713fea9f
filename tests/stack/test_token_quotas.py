"""The quota of output tokens a day: exact at all gateways together, whichever process dies."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import Int32Value
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import errors, names
from jobs.ids import ledger_workflow_id
from llm_pb import batch_pb2, llm_pb2
from tests.support.batches import Stubs
from tests.support.batches import create as create_batch
from tests.support.credentials import CallsAs
from tests.support.jobs import details_of, new_job, run_job, watch
from tests.support.ledgers import start_ledger
from tests.support.pipelines import cancel as cancel_pipeline
from tests.support.pipelines import get as get_pipeline
from tests.support.pipelines import new_pipeline
from tests.support.pipelines import submit as submit_pipeline
from tests.support.quotas import PATIENCE, Installation, TenantGateway, closed, end, queued_job, race, submit

LIMIT = 100
MUCH = 1000
TENANTS = tuple(
    # No other file has these: a tenant has one ledger in the stack that the files share.
    f"tokens-{name}"
    for name in (
        "never",
        "leases",
        "used",
        "racing",
        "continued",
        "yesterday",
        "lost",
        "terminated",
        "repeated",
        "batches",
        "next-day",
        "remainder",
        "steps",
    )
)
SOON = {"check_interval": {"nanos": 100_000_000}, "start_timeout": {"seconds": 1}}
TODAY = (datetime.now(UTC) - datetime(1970, 1, 1, tzinfo=UTC)).days


@pytest.fixture(scope="module")
def installation(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    limits = {**dict.fromkeys(TENANTS, LIMIT), "tokens-killed": MUCH}
    tenants = {name: {"max_output_tokens_per_day": limit} for name, limit in limits.items()}
    return Installation(stack, tmp_path_factory.mktemp("token-quotas"), tenants)


@pytest.fixture(scope="module")
async def gateways(installation: Installation) -> AsyncIterator[list[TenantGateway]]:
    async with installation.gateways(2) as running:
        yield running


@pytest.fixture
def gateway(gateways: list[TenantGateway]) -> TenantGateway:
    return gateways[0]


def waiting(tokens: int, **changes: Any) -> llm_pb2.JobRequest:
    """Return a job that stays open and reserves so many tokens."""
    return queued_job(params={"max_tokens": tokens}, **changes)


async def quota_of(stub: Any) -> llm_pb2.OutputTokensQuota:
    answer: llm_pb2.GetQuotaResponse = await stub.GetQuota(llm_pb2.GetQuotaRequest())
    assert not answer.HasField("open_jobs")
    return answer.output_tokens


async def usage(stub: Any) -> tuple[int, int]:
    """Return the tokens that are used and reserved."""
    quota = await quota_of(stub)
    return quota.used, quota.reserved


async def accepted(stub: Any, job: llm_pb2.JobRequest) -> str:
    answer = await submit(stub, job)
    assert isinstance(answer, llm_pb2.SubmitResponse), answer
    return answer.workflow_id


async def wait_asked_for(stub: Any, job: llm_pb2.JobRequest) -> timedelta | None:
    """Submit a job beyond the quota; return the wait that the answer asks for, None if it asks for none."""
    answer = await submit(stub, job)
    assert isinstance(answer, grpc.aio.AioRpcError)
    assert answer.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    details = details_of(answer)
    assert details["ErrorInfo"].reason == "QUOTA_EXCEEDED"
    assert details["ErrorInfo"].metadata["quota"] == "max_output_tokens_per_day"
    assert "100 output tokens a day" in details["QuotaFailure"].violations[0].description
    if "RetryInfo" not in details:
        assert "never" in (answer.details() or "")
        return None
    wait: timedelta = details["RetryInfo"].retry_delay.ToTimedelta()
    return wait


async def wait_until_room(stub: Any, job: llm_pb2.JobRequest) -> timedelta:
    """Like wait_asked_for, for a job that may fit later."""
    wait = await wait_asked_for(stub, job)
    assert wait is not None
    return wait


async def test_open_jobs_reserve_what_they_may_generate(temporal: Client, gateway: TenantGateway) -> None:
    """A budget counts where it is less than max_tokens, the model's default where the job names none (64)."""
    stub = gateway.of("tokens-leases")
    quota = await quota_of(stub)
    assert (quota.limit_per_day, quota.used, quota.reserved) == (LIMIT, 0, 0)
    assert timedelta(0) < quota.reset_time.ToDatetime(UTC) - datetime.now(UTC) <= timedelta(days=1)
    ids = [await accepted(stub, waiting(8000, budget={"output_tokens": 30})), await accepted(stub, queued_job())]
    assert await usage(stub) == (0, 94)
    assert await wait_until_room(stub, waiting(7)) < timedelta(minutes=1)
    ids.append(await accepted(stub, waiting(6)))
    await end(temporal, stub, ids)
    assert await usage(stub) == (0, 0)


async def test_a_job_gives_back_what_it_has_not_used(temporal: Client, gateway: TenantGateway) -> None:
    """What it has used is gone until the day ends, so a job that needs more is told to come back then."""
    stub = gateway.of("tokens-used")
    fault = new_job("[[fault:failed@5]]", params={"max_tokens": 90})
    seen = await run_job(stub, fault)
    assert seen.final.result.metadata.output_tokens == 5
    assert await usage(stub) == (5, 0)
    await run_job(stub, new_job(params={"max_tokens": 25}))
    assert await usage(stub) == (30, 0)
    wait = await wait_until_room(stub, waiting(71))
    midnight = (await quota_of(stub)).reset_time.ToDatetime(UTC)
    assert abs(datetime.now(UTC) + wait - midnight) < timedelta(minutes=1)
    await end(temporal, stub, [await accepted(stub, waiting(70))])


async def test_a_job_that_never_fits_is_not_told_to_come_back(temporal: Client, gateway: TenantGateway) -> None:
    stub = gateway.of("tokens-never")
    assert await wait_asked_for(stub, waiting(101)) is None
    open_job = await accepted(stub, waiting(100))
    assert await wait_asked_for(stub, waiting(101)) is None
    assert await wait_until_room(stub, waiting(100)) < timedelta(minutes=1)
    await end(temporal, stub, [open_job])


async def test_racing_submits_never_reserve_too_much(temporal: Client, gateways: list[TenantGateway]) -> None:
    stubs = [gateway.of("tokens-racing") for gateway in gateways]
    ids = await race(stubs, [waiting(10) for _ in range(40)])
    assert len(ids) == 10
    assert await usage(stubs[1]) == (0, 100)
    await end(temporal, stubs[0], ids)


async def test_a_repeated_submit_reserves_once(temporal: Client, gateways: list[TenantGateway]) -> None:
    """And it finds its job when no tokens are left, while it runs and afterwards."""
    one, other = (gateway.of("tokens-repeated") for gateway in gateways)
    job = waiting(60)
    ids = {await accepted(stub, job) for stub in (one, other, one)}
    assert len(ids) == 1
    assert await usage(one) == (0, 60)
    await end(temporal, one, ids)
    more = await accepted(one, waiting(100))
    assert await accepted(other, job) in ids
    assert await usage(one) == (0, 100)
    await end(temporal, one, [more])


async def test_a_ledger_that_continues_keeps_the_count(temporal: Client, gateway: TenantGateway) -> None:
    await start_ledger(temporal, "tokens-continued", max_updates=2)
    handle = temporal.get_workflow_handle(ledger_workflow_id("tokens-continued"))
    runs, stub = {(await handle.describe()).run_id}, gateway.of("tokens-continued")
    open_job = await accepted(stub, waiting(10))
    for used in (4, 8, 12, 16):
        await run_job(stub, new_job(params={"max_tokens": 4}))
        assert await usage(stub) == (used, 10)
        runs.add((await handle.describe()).run_id)
    assert len(runs) > 1
    await end(temporal, stub, [open_job])


async def test_a_new_day_begins_with_nothing_used(temporal: Client, gateway: TenantGateway) -> None:
    """What is still reserved counts."""
    stub = gateway.of("tokens-yesterday")
    id_ = "llmjob--tokens--yesterday-nobody-knows"
    slot = {"workflow_id": id_, "output_tokens": 40, "reserve_time": {"seconds": 4_000_000_000}}
    await start_ledger(temporal, "tokens-yesterday", day=TODAY - 1, used_tokens=95, slots=[slot])
    assert await usage(stub) == (0, 40)
    await wait_asked_for(stub, waiting(61))
    await end(temporal, stub, [await accepted(stub, waiting(60))])


async def test_a_job_whose_release_was_lost_is_counted_exactly(temporal: Client, gateway: TenantGateway) -> None:
    """The check reads what the closed job has used."""
    stub = gateway.of("tokens-lost")
    id_ = (await run_job(stub, new_job(params={"max_tokens": 7}))).final.status.workflow_id
    await closed(temporal, id_)
    await temporal.get_workflow_handle(ledger_workflow_id("tokens-lost")).terminate()
    slot = {"workflow_id": id_, "output_tokens": 90, "reserve_time": {"seconds": 4_000_000_000}}
    await start_ledger(temporal, "tokens-lost", slots=[slot], **SOON)
    job = await accepted(stub, waiting(93))
    assert await usage(stub) == (7, 93)
    await end(temporal, stub, [job])


async def test_a_killed_gateway_loses_no_token(
    installation: Installation, temporal: Client, gateway: TenantGateway
) -> None:
    """It ran the workflows of some of the jobs that it had accepted."""
    await start_ledger(temporal, "tokens-killed", **SOON)
    jobs = [new_job(params={"max_tokens": 20 + number}) for number in range(10)]
    async with installation.gateway() as dying:
        ids = [await accepted(dying.of("tokens-killed"), job) for job in jobs]
        await dying.process.kill()
    stub, used = gateway.of("tokens-killed"), 0
    for id_ in ids:
        used += (await watch(stub, id_)).final.result.metadata.output_tokens
    assert used == 245
    async with asyncio.timeout(PATIENCE):
        while await usage(stub) != (used, 0):
            # What is refused makes the ledger check its slots.
            assert isinstance(await submit(stub, waiting(MUCH + 1)), grpc.aio.AioRpcError)
            await asyncio.sleep(0.1)


async def test_a_terminated_job_counts_with_all_that_it_reserved(temporal: Client, gateway: TenantGateway) -> None:
    await start_ledger(temporal, "tokens-terminated", **SOON)
    stub = gateway.of("tokens-terminated")
    await temporal.get_workflow_handle(await accepted(stub, waiting(60))).terminate()
    async with asyncio.timeout(PATIENCE):
        while isinstance(answer := await submit(stub, waiting(41)), grpc.aio.AioRpcError):
            if (await usage(stub)) == (60, 0):
                break
            await asyncio.sleep(0.1)
    assert isinstance(answer, grpc.aio.AioRpcError)


async def test_batches_without_a_budget_use_no_more_than_the_day_has(
    temporal: Client, gateways: list[TenantGateway]
) -> None:
    """Two at two gateways lease what their lines need, and wait where the day has no more. Others get their share."""
    stub, lines = gateways[0].of("tokens-batches"), long_lines(6, 20)
    both = [batches_of(gateway, "tokens-batches") for gateway in gateways]
    created = await asyncio.gather(*(create_batch(stubs, lines) for stubs in both))
    async with asyncio.timeout(PATIENCE):
        while sum(quota := await usage(stub)) <= LIMIT - 20:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert sum(quota) <= LIMIT
    assert isinstance(await submit(stub, waiting(20)), grpc.aio.AioRpcError)
    # What has ended is counted and can be read while its part of the batch waits.
    # One of them may first get what the other gives back.
    counted = 0
    async with asyncio.timeout(PATIENCE):
        while counted <= LIMIT - 20:
            waits = [await stubs.get(status.batch_id) for stubs, status in zip(both, created, strict=True)]
            counted = sum(status.usage.output_tokens for status in waits)
            await asyncio.sleep(0.1)
    for stubs, status in zip(both, waits, strict=True):
        await until_nothing_runs(temporal, status.batch_id)
        await read_some(stubs, status.batch_id, status.counts.succeeded)
    await asyncio.gather(*(stubs.cancel(status.batch_id) for stubs, status in zip(both, created, strict=True)))
    ended = await asyncio.gather(*(stubs.end(status.batch_id) for stubs, status in zip(both, created, strict=True)))
    spent = sum(status.usage.output_tokens for status in ended)
    assert 0 < spent == counted <= LIMIT
    assert {status.state for status in ended} == {batch_pb2.BATCH_STATE_CANCELLED}
    async with asyncio.timeout(PATIENCE):
        while await usage(stub) != (spent, 0):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@pytest.mark.long
async def test_a_batch_goes_on_with_what_a_day_has(temporal: Client, gateway: TenantGateway) -> None:
    """It succeeds to the token once there is room. An item that no day has room for ends its batch."""
    await start_ledger(temporal, "tokens-next-day", day=TODAY, used_tokens=LIMIT - 30, **SOON)
    stubs = batches_of(gateway, "tokens-next-day")
    never = await stubs.end((await create_batch(stubs, long_lines(1, LIMIT + 1))).batch_id)
    assert (never.state, never.usage.output_tokens) == (batch_pb2.BATCH_STATE_FAILED, 0)
    assert errors.reason_of(never.error) == "QUOTA_EXCEEDED"
    status = await stubs.end((await create_batch(stubs, long_lines(3, 10))).batch_id)
    assert (status.state, status.usage.output_tokens) == (batch_pb2.BATCH_STATE_SUCCEEDED, 30)
    assert await usage(gateway.of("tokens-next-day")) == (LIMIT, 0)


async def test_a_batch_that_waits_for_another_day_holds_nothing_of_this_one(
    temporal: Client, gateway: TenantGateway
) -> None:
    """What is less than its next line needs is for others."""
    await start_ledger(temporal, "tokens-remainder", day=TODAY, used_tokens=LIMIT - 40, **SOON)
    stub, stubs = gateway.of("tokens-remainder"), batches_of(gateway, "tokens-remainder")
    # A quarter of what is free is leased for the first line, and what it leaves is too little for the second.
    batch = await create_batch(stubs, [*long_lines(1, 1), long_lines(2, 45)[1]])
    async with asyncio.timeout(PATIENCE):
        while await usage(stub) != (LIMIT - 39, 0):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert isinstance(await submit(stub, waiting(40)), grpc.aio.AioRpcError)
    assert isinstance(await submit(stub, waiting(39)), llm_pb2.SubmitResponse)
    await stubs.cancel(batch.batch_id)
    ended = await stubs.end(batch.batch_id)
    assert (ended.state, ended.usage.output_tokens) == (batch_pb2.BATCH_STATE_CANCELLED, 1)


@pytest.mark.long
async def test_the_steps_of_a_pipeline_wait_where_the_day_has_no_more(gateway: TenantGateway) -> None:
    """Each leases the most that its job may generate. They use what there is, and no more."""
    stub = gateway.of("tokens-steps")
    pipelines = CallsAs(gateway.pipelines, gateway.keys["tokens-steps"])
    id_ = (await submit_pipeline(pipelines, new_pipeline("spending", Int32Value(value=20)))).pipeline_id
    async with asyncio.timeout(PATIENCE):
        while await usage(stub) != (LIMIT // 8 * 8, 0):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert isinstance(await submit(stub, waiting(8)), grpc.aio.AioRpcError)
    await cancel_pipeline(pipelines, id_)
    async with asyncio.timeout(PATIENCE):
        while (await get_pipeline(pipelines, id_)).status.state != llm_pb2.JOB_STATE_CANCELLED:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        while await usage(stub) != (LIMIT // 8 * 8, 0):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def until_nothing_runs(temporal: Client, batch_id: str) -> None:
    """Return once no part of a batch runs or waits for a worker."""
    async with asyncio.timeout(PATIENCE):
        while True:
            described = await temporal.get_workflow_handle(batch_id).describe()
            pending = described.raw_description.pending_activities
            if all(one.activity_type.name != names.ACTIVITY_RUN_BATCH_CHUNK for one in pending):
                return
            await asyncio.sleep(0.1)


async def read_some(stubs: Stubs, batch_id: str, least: int) -> None:
    """Read so many results of a batch that has not ended."""
    found = 0
    request = batch_pb2.StreamBatchResultsRequest(batch_id=batch_id)
    call = stubs.batches.StreamBatchResults(request, timeout=PATIENCE)
    while found < least:
        found += len((await call.read()).items)
    call.cancel()


def batches_of(gateway: TenantGateway, tenant: str) -> Stubs:
    """Return the stubs by which a tenant creates batches."""
    key = gateway.keys[tenant]
    return Stubs(CallsAs(gateway.files, key), CallsAs(gateway.batches, key))


def long_lines(count: int, tokens: int) -> list[dict[str, Any]]:
    """Return lines whose answers have exactly so many tokens."""
    line = {"model": "docstrings", "prompt": "Say it.", "params": {"max_tokens": tokens}}
    return [{"request_id": f"{number}", **line} for number in range(count)]
