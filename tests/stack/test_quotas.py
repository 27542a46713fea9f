"""Quotas of tenants, at gateways of their own: how often a tenant may call, and how many of its jobs may be open."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.service import RPCError, RPCStatusCode

from deploy.local.stack import Stack
from durable_llm import AsyncClient, RetryPolicy
from durable_llm.errors import QuotaExceeded
from jobs import names
from jobs.ids import ledger_workflow_id, tenant_of
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from payload_converter import data_converter
from tests.support import pipelines
from tests.support.credentials import CallsAs, bearer
from tests.support.files import until
from tests.support.jobs import details_of, new_job
from tests.support.ledgers import ask_while_checking, lease_in_a_check, reserve_with_a_failing_check, start_ledger
from tests.support.quotas import (
    PATIENCE,
    Installation,
    TenantGateway,
    closed,
    end,
    is_refused,
    queued_job,
    race,
    reason_of,
    submit,
    until_accepted,
)
from tests.support.replays import replay
from tests.support.scrapes import Scrape, scrape, scrape_until
from workflows.llm_ledger import LLMLedgerWorkflow

SLOW = {"requests_per_second": 0.01, "request_burst": 3}
SOON = {"check_interval": {"nanos": 100_000_000}, "start_timeout": {"seconds": 1}}
TENANTS: dict[str, dict[str, Any]] = {
    "free": {},
    "calls": SLOW,
    "streams": SLOW,
    "garbage": SLOW,
    "burst": {"requests_per_second": 0.5},
    "racing": {"max_open_jobs": 100},
    "continued": {"max_open_jobs": 30},
    **{
        name: {"max_open_jobs": 1}
        for name in ("told", "repeats", "reused", "ended", "notified", "terminated", "deleted", "client", "costs")
    },
    "lowered": {"max_open_jobs": 3},
    "none": {"max_open_jobs": 0},
    "again": {"max_open_jobs": 2, "max_output_tokens_per_day": 100},
    "measured": {"max_open_jobs": 4, "max_output_tokens_per_day": 100},
    "with-hyphen": {"max_open_jobs": 2, "requests_per_second": 50, "request_burst": 70, "weight": 4},
}
NEEDS_ANSWER = pipeline_pb2.STEP_STATE_NEEDS_ANSWER
QUOTAS = {"requests_per_second", "max_open_jobs", "max_output_tokens_per_day"}


@pytest.fixture(scope="module")
def installation(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(stack, tmp_path_factory.mktemp("quotas"), TENANTS)


@pytest.fixture(scope="module")
async def gateways(installation: Installation) -> AsyncIterator[list[TenantGateway]]:
    async with installation.gateways(2) as running:
        yield running


@pytest.fixture
def gateway(gateways: list[TenantGateway]) -> TenantGateway:
    return gateways[0]


async def is_unused(gateway: TenantGateway, tenant: str) -> bool:
    return await gateway.used(tenant) == 0


async def refused(call: Any) -> dict[str, Any]:
    """Return the details with which a quota has refused a call."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    details = details_of(error.value)
    assert details["ErrorInfo"].reason == "QUOTA_EXCEEDED"
    assert details["ErrorInfo"].domain == "llm.v1"
    return details


async def test_a_tenant_calls_so_often(gateway: TenantGateway) -> None:
    """What is refused says whose quota it was and how long to wait. Others, and health, are not affected."""
    stub = gateway.of("calls")
    for _ in range(3):
        await stub.ListModels(llm_pb2.ListModelsRequest())
    details = await refused(stub.ListModels(llm_pb2.ListModelsRequest()))
    (violation,) = details["QuotaFailure"].violations
    assert violation.subject == "tenant:calls"
    assert "0.01 calls a second" in violation.description
    assert details["ErrorInfo"].metadata["quota"] == "requests_per_second"
    # One token comes in 100 s.
    wait = details["RetryInfo"].retry_delay.ToTimedelta()
    assert timedelta(0) < wait <= timedelta(seconds=100)
    await gateway.of("free").ListModels(llm_pb2.ListModelsRequest())
    await gateway.of("").ListModels(llm_pb2.ListModelsRequest())


async def test_health_is_not_counted(stack: Stack, gateway: TenantGateway) -> None:
    async with grpc.aio.insecure_channel(stack.address(gateway.process.name)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(20):
            await health.Check(health_pb2.HealthCheckRequest(), metadata=bearer(gateway.keys["burst"]))
    # All of the burst is there: one call.
    await gateway.of("burst").ListModels(llm_pb2.ListModelsRequest())


async def test_a_call_too_many_is_refused_before_it_is_parsed(stack: Stack, gateway: TenantGateway) -> None:
    """What breaks rules counts, and beyond the quota nothing is said of it."""
    path, metadata = "/llm.v1.LlmService/Submit", bearer(gateway.keys["garbage"])
    async with grpc.aio.insecure_channel(stack.address(gateway.process.name)) as channel:
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(path)(b"\xff\xff", metadata=metadata)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        details = await refused(channel.unary_unary(path)(b"\xff\xff", metadata=metadata))
        assert "BadRequest" not in details


async def test_a_stream_counts_once_as_it_begins(gateway: TenantGateway) -> None:
    """However many messages it has. A stream too many is refused as other calls are."""
    stub = gateway.of("streams")
    submitted = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 60})))
    request = llm_pb2.StreamStatusRequest(workflow_id=submitted.workflow_id)
    messages = [message async for message in stub.StreamStatus(request)]
    assert len(messages) > 3
    await stub.ListModels(llm_pb2.ListModelsRequest())
    await refused(stub.StreamStatus(request).read())


async def test_two_gateways_accept_exactly_the_quota(temporal: Client, gateways: list[TenantGateway]) -> None:
    """Of 1,000 jobs that race for 100 slots; and as many again after those have ended."""
    stubs = [gateway.of("racing") for gateway in gateways]
    for _ in range(2):
        accepted = await race(stubs, [queued_job() for _ in range(1000)])
        assert len({*accepted}) == len(accepted) == 100
        assert await gateways[1].used("racing") == 100
        # As Temporal has it.
        found = [await temporal.get_workflow_handle(id_).describe() for id_ in accepted]
        assert {each.status for each in found} == {WorkflowExecutionStatus.RUNNING}
        assert await is_refused(stubs[0])
        await end(temporal, stubs[1], accepted)
        # On a busy machine a slot may be free some time after its job has ended.
        await until(lambda: is_unused(gateways[0], "racing"))


async def test_a_ledger_that_continues_in_mid_race_loses_nothing(
    temporal: Client, gateways: list[TenantGateway]
) -> None:
    """It continues in a new run after every third update, while two gateways reserve and jobs release."""
    await start_ledger(temporal, "continued", max_updates=3)
    handle = temporal.get_workflow_handle(ledger_workflow_id("continued"))
    runs = {(await handle.describe()).run_id}
    stubs = [gateway.of("continued") for gateway in gateways]
    for _ in range(4):
        accepted = [id_ for _ in range(5) for id_ in await race(stubs, [queued_job() for _ in range(20)])]
        assert len(accepted) == 30
        assert await gateways[1].used("continued") == 30
        await end(temporal, stubs[0], accepted)
        runs.add((await handle.describe()).run_id)
        assert await gateways[0].used("continued") == 0
    assert len(runs) > 2


async def test_a_job_beyond_the_quota_is_told_so(temporal: Client, gateway: TenantGateway) -> None:
    """And nothing was accepted. The end of a job makes room for the next, as soon as its watchers see it."""
    stub = gateway.of("told")
    first = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 400})))
    job = queued_job()
    details = await refused(stub.Submit(llm_pb2.SubmitRequest(job=job)))
    (violation,) = details["QuotaFailure"].violations
    assert violation.subject == "tenant:told"
    assert "1 open jobs" in violation.description
    assert details["ErrorInfo"].metadata["quota"] == "max_open_jobs"
    assert details["RetryInfo"].retry_delay.ToTimedelta() > timedelta(0)
    async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=first.workflow_id)):
        final = message
    assert final.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    second = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    assert tenant_of(second.workflow_id) == "told"
    await end(temporal, stub, [second.workflow_id])


async def test_a_repeated_submit_needs_one_slot(temporal: Client, gateways: list[TenantGateway]) -> None:
    """At any gateway, at once or later, with a full quota or after the job's end."""
    one, other = (gateway.of("repeats") for gateway in gateways)
    job = queued_job()
    answers = await asyncio.gather(*(submit(stub, job) for stub in (one, other) * 20))
    assert len({answer.workflow_id for answer in answers if isinstance(answer, llm_pb2.SubmitResponse)}) == 1
    assert all(isinstance(answer, llm_pb2.SubmitResponse) for answer in answers)
    assert await gateways[0].used("repeats") == 1
    first = answers[0].workflow_id
    await end(temporal, one, [first])
    assert (await other.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id == first
    assert await gateways[0].used("repeats") == 0
    second = await other.Submit(llm_pb2.SubmitRequest(job=queued_job()))
    # The quota is full, and the first job, which has ended, is found nevertheless.
    assert (await one.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id == first
    assert await gateways[0].used("repeats") == 1
    await end(temporal, one, [second.workflow_id])


async def test_a_key_that_was_used_takes_no_slot(temporal: Client, gateway: TenantGateway) -> None:
    """While its job is open, and after its end."""
    stub, job = gateway.of("reused"), queued_job()
    first = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    other = queued_job(user_id=job.user_id, request_id=job.request_id, project_id="another")
    for used in (1, 0):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Submit(llm_pb2.SubmitRequest(job=other))
        assert reason_of(error.value) == "REQUEST_ID_REUSED"
        assert await gateway.used("reused") == used
        await end(temporal, stub, [first.workflow_id])


@pytest.mark.parametrize(
    "job",
    [
        {"prompt": "[[fault:oom@1]][[fault:oom@1]][[fault:oom@1]]"},
        {"model": "idle", "timeouts": {"queue": {"seconds": 1}}},
        {"model": "idle", "timeouts": {"total": {"seconds": 1}}},
        {"params": {"max_tokens": 1}},
    ],
    ids=["failed", "queue timeout", "total timeout", "succeeded"],
)
async def test_every_outcome_releases_the_slot(temporal: Client, gateway: TenantGateway, job: dict[str, Any]) -> None:
    """By the job itself: no check runs in this time."""
    stub = gateway.of("ended")
    submitted = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(**job)))
    await closed(temporal, submitted.workflow_id)
    assert await gateway.used("ended") == 0


async def test_a_job_that_notifies_is_not_open_any_more(temporal: Client, gateway: TenantGateway) -> None:
    """And a repeat of it takes no slot."""
    stub = gateway.of("notified")
    # Nobody listens there, so the job notifies until its time to hold is over.
    target = llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url="http://127.0.0.1:9/"))
    job = new_job(params={"max_tokens": 1}, notify=[target])
    submitted = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    async with asyncio.timeout(PATIENCE):
        while await gateway.used("notified"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    again = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    assert again.workflow_id == submitted.workflow_id
    assert await gateway.used("notified") == 0


async def test_the_slot_of_a_terminated_job_comes_back(temporal: Client, gateway: TenantGateway) -> None:
    await start_ledger(temporal, "terminated", **SOON)
    stub = gateway.of("terminated")
    submitted = await stub.Submit(llm_pb2.SubmitRequest(job=queued_job()))
    assert await is_refused(stub)
    await temporal.get_workflow_handle(submitted.workflow_id).terminate()
    await until_accepted(stub, queued_job())


async def test_the_slot_of_a_deleted_job_comes_back(temporal: Client, gateway: TenantGateway) -> None:
    """Of which Temporal knows nothing any more."""
    await start_ledger(temporal, "deleted", **SOON)
    stub = gateway.of("deleted")
    submitted = await stub.Submit(llm_pb2.SubmitRequest(job=queued_job()))
    execution = WorkflowExecution(workflow_id=submitted.workflow_id)
    request = DeleteWorkflowExecutionRequest(namespace=temporal.namespace, workflow_execution=execution)
    await temporal.workflow_service.delete_workflow_execution(request)
    await until_accepted(stub, queued_job())


async def until_asked(stub: Any, id_: str) -> None:
    """Return once the pipeline waits for an answer."""
    waits = lambda seen: "ask" in seen.steps and seen.steps["ask"].state == NEEDS_ANSWER  # noqa: E731
    seen = await pipelines.follow(stub, id_, until=waits)
    assert not seen.ended, seen.status


async def usage_of(gateway: TenantGateway, tenant: str) -> tuple[int, int, int]:
    """Return the number of open jobs of a tenant, and those of the output tokens that are reserved and used."""
    quota = await gateway.of(tenant).GetQuota(llm_pb2.GetQuotaRequest())
    return quota.open_jobs.used, quota.output_tokens.reserved, quota.output_tokens.used


async def test_a_late_release_frees_no_slot_of_a_pipeline_that_was_submitted_again(
    temporal: Client, gateways: list[TenantGateway]
) -> None:
    """The Release of the run that has failed comes once more when the next run has the slot.

    That run is submitted many times at once, at both gateways, and counts once.
    """
    one, other = (CallsAs(gateway.pipelines, gateway.keys["again"]) for gateway in gateways)
    pipeline = pipelines.new_pipeline("asking", StringValue(value="May I?"), budget={"output_tokens": 10})
    id_ = (await pipelines.submit(one, pipeline)).pipeline_id
    await until_asked(one, id_)
    await pipelines.answer(one, id_, "ask", "first", approved=False)
    await closed(temporal, id_)
    assert await usage_of(gateways[0], "again") == (0, 0, 4)
    ledger = temporal.get_workflow_handle(ledger_workflow_id("again"))
    releases = await releases_of(ledger)
    assert [[*release.workflow_ids] for release in releases] == [[id_]]

    again = await asyncio.gather(*(pipelines.submit(stub, pipeline) for stub in (one, other) * 5))
    assert {status.pipeline_id for status in again} == {id_}
    for release in releases:
        await ledger.signal(names.SIGNAL_RELEASE, release)
    await until_asked(other, id_)
    assert await usage_of(gateways[1], "again") == (1, 10, 4)
    await pipelines.answer(other, id_, "ask", "second", approved=True)
    await closed(temporal, id_)
    # The text is that of the run which has failed.
    assert await usage_of(gateways[1], "again") == (0, 0, 4)


async def releases_of(ledger: WorkflowHandle[Any, Any]) -> list[internal_pb2.ReleaseRequest]:
    """Return what the signals Release of a ledger's last run say."""
    payloads = [
        event.workflow_execution_signaled_event_attributes.input.payloads[0]
        async for event in ledger.fetch_history_events()
        if event.HasField("workflow_execution_signaled_event_attributes")
    ]
    types: list[type] = [internal_pb2.ReleaseRequest] * len(payloads)
    return await data_converter.decode(payloads, types)


async def test_a_check_frees_no_slot_of_a_pipeline_that_is_about_to_start_again(
    temporal: Client, gateway: TenantGateway
) -> None:
    """The run that it finds is the one which has failed. Where the next one does not start, its slot comes back."""
    stub = CallsAs(gateway.pipelines, gateway.keys["free"])
    pipeline = pipelines.new_pipeline("broken", Struct())
    id_ = (await pipelines.submit(stub, pipeline)).pipeline_id
    await closed(temporal, id_)
    for start_timeout, frees in ((60, False), (0, True)):
        tenant = f"checks-{uuid.uuid4().hex[:8]}"
        await start_ledger(temporal, tenant, check_interval={"nanos": 1}, start_timeout={"seconds": start_timeout})
        ledger = temporal.get_workflow_handle(ledger_workflow_id(tenant))

        async def reserve(name: str, reservation: int = 0) -> bool:
            request = internal_pb2.ReserveRequest(workflow_ids=[name], limit=1, reservations=[reservation])
            answer = await ledger.execute_update(  # noqa: B023
                names.UPDATE_RESERVE, request, result_type=internal_pb2.ReserveResponse
            )
            return not answer.refused

        # The test stands for a gateway that is about to start the pipeline.
        assert await reserve(id_, time.time_ns())
        assert await reserve("another") == frees
        await ledger.terminate()


async def test_a_lower_quota_ends_no_job(temporal: Client, installation: Installation, gateway: TenantGateway) -> None:
    """It takes effect with the next Submit of a gateway that has it, without another ledger."""
    stub = gateway.of("lowered")
    ids = [(await stub.Submit(llm_pb2.SubmitRequest(job=queued_job()))).workflow_id for _ in range(3)]
    async with installation.gateway(GATEWAY_TENANTS='{"lowered": {"max_open_jobs": 1}}') as later:
        quota = (await later.of("lowered").GetQuota(llm_pb2.GetQuotaRequest())).open_jobs
        assert (quota.limit, quota.used) == (1, 3)
        for id_ in ids[:2]:
            assert await is_refused(later.of("lowered"))
            await end(temporal, stub, [id_])
        assert await is_refused(later.of("lowered"))
        await end(temporal, stub, ids[2:])
        await later.of("lowered").Submit(llm_pb2.SubmitRequest(job=queued_job()))
        assert await is_refused(later.of("lowered"))
    # Two more fit at the gateway with the earlier setting.
    await stub.Submit(llm_pb2.SubmitRequest(job=queued_job()))


async def test_a_quota_of_zero_accepts_nothing(gateway: TenantGateway) -> None:
    assert await is_refused(gateway.of("none"))
    assert await gateway.used("none") == 0


async def test_a_tenant_reads_its_quotas(temporal: Client, gateway: TenantGateway) -> None:
    """Those that it does not have are absent."""
    stub = gateway.of("with-hyphen")
    submitted = await stub.Submit(llm_pb2.SubmitRequest(job=queued_job()))
    quota = await stub.GetQuota(llm_pb2.GetQuotaRequest())
    assert (quota.tenant, quota.weight) == ("with-hyphen", 4)
    assert (quota.open_jobs.limit, quota.open_jobs.used) == (2, 1)
    assert (quota.requests.per_second, quota.requests.burst) == (50, 70)
    assert 0 <= quota.requests.available < 70
    await end(temporal, stub, [submitted.workflow_id])
    free = await gateway.of("free").GetQuota(llm_pb2.GetQuotaRequest())
    assert free == llm_pb2.GetQuotaResponse(tenant="free", weight=1)
    assert await gateway.of("").GetQuota(llm_pb2.GetQuotaRequest()) == llm_pb2.GetQuotaResponse()


async def test_the_python_client_waits_as_it_is_told(stack: Stack, temporal: Client, gateway: TenantGateway) -> None:
    """And raises QuotaExceeded to who does not want to wait."""
    metadata, address = dict(bearer(gateway.keys["client"])), stack.address(gateway.process.name)
    impatient = RetryPolicy(give_up_after=timedelta(0))
    async with (
        AsyncClient(address, metadata=metadata) as client,
        AsyncClient(address, metadata=metadata, retry=impatient) as other,
    ):
        first = await client.submit(queued_job())
        assert (await client.quota()).open_jobs.used == 1
        with pytest.raises(QuotaExceeded) as error:
            await other.submit(queued_job())
        assert error.value.retry_delay
        waiting = asyncio.create_task(client.submit(queued_job()))
        await first.cancel()
        await waiting


async def test_refusals_are_counted_by_tenant_and_quota(stack: Stack, gateway: TenantGateway) -> None:
    """Each quota of a tenant has its series before the first refusal, and a tenant without quotas has none."""
    assert await is_refused(gateway.of("none"))
    found = (await scrape(stack, gateway.process.name)).by(
        "llm_gateway_quota_refusals_total", "llm_tenant", "llm_quota"
    )
    assert found["none", "max_open_jobs"] >= 1
    assert {(tenant, quota) for tenant, limits in TENANTS.items() for quota in QUOTAS & limits.keys()} == found.keys()


async def test_the_used_share_of_each_quota_is_measured(
    stack: Stack, temporal: Client, installation: Installation
) -> None:
    """At every gateway, whichever has reserved the slots. A quota of nothing has no share."""

    def shares(found: Scrape) -> dict[tuple[str, ...], float]:
        return found.by("llm_quota_usage_ratio", "llm_tenant", "llm_quota")

    async with installation.gateway(GATEWAY_OPEN_JOBS_INTERVAL="PT1S") as gateway:
        id_ = await until_accepted(gateway.of("measured"), queued_job(params={"max_tokens": 50}))
        measured = {("measured", "max_open_jobs"): 0.25, ("measured", "max_output_tokens_per_day"): 0.5}
        found = shares(
            await scrape_until(stack, lambda found: measured.items() <= shares(found).items(), gateway.process.name)
        )
        assert ("none", "max_open_jobs") not in found
        await end(temporal, gateway.of("measured"), [id_])
        await scrape_until(stack, lambda found: shares(found)["measured", "max_open_jobs"] == 0, gateway.process.name)


async def test_a_tenant_without_a_quota_pays_nothing(temporal: Client, gateway: TenantGateway) -> None:
    """No ledger, and the same history as without tenants. A slot costs a job no event either."""
    histories = {}
    for tenant in ("", "free", "costs"):
        submitted = await gateway.of(tenant).Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 1})))
        await closed(temporal, submitted.workflow_id)
        handle = temporal.get_workflow_handle(submitted.workflow_id)
        histories[tenant] = [event.event_type async for event in handle.fetch_history_events()]
        memo = await (await handle.describe()).memo()
        assert (names.MEMO_LEDGER in memo) == (tenant == "costs")
    assert histories[""] == histories["free"] == histories["costs"]
    with pytest.raises(RPCError) as error:
        await temporal.get_workflow_handle(ledger_workflow_id("free")).describe()
    assert error.value.status == RPCStatusCode.NOT_FOUND


async def test_the_ledger_is_no_job(gateway: TenantGateway) -> None:
    stub = gateway.of("costs")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=ledger_workflow_id("costs")))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("inputs", [[], ["text"], [1, 2]])
async def test_an_update_by_hand_breaks_no_ledger(temporal: Client, stack: Stack, inputs: list[Any]) -> None:
    """It is refused, and the ledger goes on."""
    tenant = f"by-hand-{len(inputs)}"
    await start_ledger(temporal, tenant)
    handle = temporal.get_workflow_handle(ledger_workflow_id(tenant))
    with pytest.raises(WorkflowUpdateFailedError):
        await handle.execute_update(names.UPDATE_RESERVE, args=inputs)
    await handle.signal(names.SIGNAL_RELEASE)
    assert await handle.query(names.QUERY_GET_LEDGER) is not None


async def test_a_lease_after_the_end_of_its_batch_keeps_no_slot(temporal: Client, stack: Stack) -> None:
    """Its request was under way as the batch ended. A batch that is started again leases tokens again."""
    tenant = f"late-{uuid.uuid4().hex[:8]}"
    await start_ledger(temporal, tenant)
    ledger = temporal.get_workflow_handle(ledger_workflow_id(tenant))
    batch = f"llmbatch--{tenant}-a-b"
    reserve = internal_pb2.ReserveRequest(workflow_ids=[batch], limit=5)
    lease = internal_pb2.LeaseRequest(workflow_id=batch, least_tokens=1, wanted_tokens=9, output_tokens_limit=100)

    async def leased() -> int:
        answer = await ledger.execute_update(names.UPDATE_LEASE, lease, result_type=internal_pb2.LeaseResponse)
        return answer.leased_tokens

    await ledger.execute_update(names.UPDATE_RESERVE, reserve, result_type=internal_pb2.ReserveResponse)
    assert await leased() == 9
    release = internal_pb2.ReleaseRequest(workflow_ids=[batch], output_tokens=[4])
    await ledger.signal(names.SIGNAL_RELEASE, release)
    assert await leased() == 0
    usage = await ledger.query(names.QUERY_GET_USAGE, result_type=internal_pb2.LedgerUsage)
    assert (usage.slots, usage.reserved_tokens, usage.used_tokens) == (0, 0, 4)
    await ledger.execute_update(names.UPDATE_RESERVE, reserve, result_type=internal_pb2.ReserveResponse)
    assert await leased() == 9
    await ledger.terminate()


async def test_a_check_that_fails_changes_nothing(temporal: Client) -> None:
    """It failed the Reserve that had asked for it, and the ledger itself where none had."""
    refused, usage, _ = await reserve_with_a_failing_check(temporal, f"unchecked-{uuid.uuid4().hex[:8]}")
    assert (refused, usage.slots) == (["llmjob-a-c"], 1)


async def test_a_ledger_that_is_asked_all_the_time_can_be_replayed(temporal: Client) -> None:
    """A query may end a workflow task before the code has got the result of a local activity."""
    id_ = await ask_while_checking(temporal, f"asked-{uuid.uuid4().hex[:8]}")
    await replay(temporal.get_workflow_handle(id_), LLMLedgerWorkflow)


async def test_a_lease_that_waits_for_a_check_keeps_no_slot_of_a_batch_that_ends_meanwhile(temporal: Client) -> None:
    leased, usage, _ = await lease_in_a_check(temporal, f"checked-{uuid.uuid4().hex[:8]}")
    assert leased == 0
    assert (usage.slots, usage.reserved_tokens, usage.used_tokens) == (0, 0, 4)
