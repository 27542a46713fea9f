"""List under many concurrent calls and with a slow Temporal, and the validity of its page tokens."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import NamedTuple

import grpc
import pytest
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import details_of, new_job, until_answered
from tests.support.temporal_proxy import TemporalProxy, temporal_proxy

KEY = {"GATEWAY_PAGE_TOKEN_KEY": "only gateways know this"}
USER = "many-open"
OPEN = 20
LIST_TIMEOUT = timedelta(seconds=4)
PATIENCE = 5 * LIST_TIMEOUT.total_seconds()
"""Seconds that a client waits. They are less than the default timeout of a call to Temporal, 30 s."""


class Slow(NamedTuple):
    """A gateway that reaches Temporal through a proxy."""

    stub: LlmServiceStub
    proxy: TemporalProxy


@pytest.fixture(scope="module")
async def slow(stack: Stack) -> AsyncIterator[Slow]:
    async with temporal_proxy(stack.address("temporal")) as (proxy, address):
        gateway = stack.add(
            "gateway", {"GATEWAY_ROLE": "api", "TEMPORAL_ADDRESS": address, "GATEWAY_LIST_TIMEOUT": "PT4S", **KEY}
        )
        await gateway.start()
        await gateway.wait_ready()
        async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
            yield Slow(LlmServiceStub(channel), proxy)
        await gateway.terminate()


@pytest.fixture(scope="module")
async def open_jobs(stub: LlmServiceStub) -> AsyncIterator[None]:
    """Keep jobs open that wait for a worker. List shows them."""
    jobs = [new_job(user_id=USER, model="idle") for _ in range(OPEN)]
    ids = [(await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id for job in jobs]
    async with asyncio.timeout(60):
        # Temporal's visibility store is updated a moment later, and nothing notifies.
        while len((await stub.List(llm_pb2.ListRequest(user_id=USER, page_size=100))).jobs) < OPEN:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    yield
    for id_ in ids:
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


async def test_many_lists_look_at_few_jobs_at_once(slow: Slow, open_jobs: None) -> None:
    """However many pages are requested, the gateway keeps its limit of concurrent calls that describe a job."""
    method = "DescribeWorkflowExecution"
    slow.proxy.delays[method] = 0.1
    request = llm_pb2.ListRequest(user_id=USER, page_size=OPEN)

    try:
        async with asyncio.timeout(120):
            # A busy machine may not list in the time that this gateway gives it.
            pages = await asyncio.gather(
                *(until_answered(lambda: slow.stub.List(request, timeout=60)) for _ in range(10))
            )
    finally:
        slow.proxy.delays.clear()
    assert all(len(page.jobs) == OPEN for page in pages)
    assert 8 < slow.proxy.peaks[method] <= 32


async def test_a_list_that_temporal_does_not_answer_ends(slow: Slow) -> None:
    """It ends with UNAVAILABLE and RetryInfo, long before a client's deadline."""
    slow.proxy.silent.add("ListWorkflowExecutions")
    try:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await slow.stub.List(llm_pb2.ListRequest(), timeout=PATIENCE)
    finally:
        slow.proxy.silent.clear()
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    details = details_of(error.value)
    assert details["ErrorInfo"].reason == "TEMPORAL_UNAVAILABLE"
    assert details["RetryInfo"].retry_delay.ToTimedelta() > timedelta(0)


async def test_jobs_that_cannot_be_looked_at_in_time_are_listed(slow: Slow, open_jobs: None) -> None:
    """They are listed as open. The page comes, and it has a token for the next one."""
    slow.proxy.silent.add("DescribeWorkflowExecution")
    try:
        page = await slow.stub.List(llm_pb2.ListRequest(user_id=USER, page_size=OPEN - 1), timeout=PATIENCE)
    finally:
        slow.proxy.silent.clear()
    assert [job.status.state for job in page.jobs] == [llm_pb2.JOB_STATE_RUNNING] * (OPEN - 1)
    assert page.next_page_token


class Gateways(NamedTuple):
    """Two gateways with the same key for page tokens, and one that generated its own key."""

    one: LlmServiceStub
    other: LlmServiceStub
    own: LlmServiceStub


@pytest.fixture(scope="module")
async def gateways(stack: Stack, slow: Slow, stub: LlmServiceStub) -> AsyncIterator[Gateways]:
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", **KEY})
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield Gateways(LlmServiceStub(channel), slow.stub, stub)
    await gateway.terminate()


async def refused(stub: LlmServiceStub, request: llm_pb2.ListRequest) -> list[tuple[str, bool]]:
    """Return the fields of the violations, and whether each names the setting."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.List(request)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    violations = details_of(error.value)["BadRequest"].field_violations
    return [(item.field, "GATEWAY_PAGE_TOKEN_KEY" in item.description) for item in violations]


async def test_a_page_token_holds_at_every_gateway_with_its_key(gateways: Gateways, open_jobs: None) -> None:
    """Other gateways refuse it. One without a key says that it has none."""
    request = llm_pb2.ListRequest(user_id=USER, page_size=OPEN // 2)
    first = await gateways.one.List(request)
    request.page_token = first.next_page_token
    second = await gateways.other.List(request)
    ids = {job.status.workflow_id for page in (first, second) for job in page.jobs}
    assert len(ids) == OPEN
    assert await refused(gateways.own, request) == [("page_token", True)]


async def test_a_page_token_that_no_gateway_made_is_refused(
    gateways: Gateways, temporal: Client, open_jobs: None
) -> None:
    """Forgeries join Temporal's own token to bytes that a client can compute or has seen, an old form included."""
    request = llm_pb2.ListRequest(user_id=USER, page_size=1)
    sealed = base64.urlsafe_b64decode((await gateways.one.List(request)).next_page_token)
    page = temporal.list_workflows("WorkflowType = 'LLMJobWorkflow'", page_size=2)
    await page.fetch_next_page()
    theirs = page.next_page_token
    assert theirs is not None
    filters = hashlib.sha256(llm_pb2.ListRequest(user_id=USER).SerializeToString(deterministic=True)).digest()
    for forged in (
        theirs,
        filters[:8] + theirs,
        filters + theirs,
        sealed[:16] + theirs,
        sealed[:-1] + b"x",
        sealed[1:],
    ):
        request.page_token = base64.urlsafe_b64encode(forged).decode()
        assert await refused(gateways.one, request) == [("page_token", False)]


async def test_a_gateway_without_a_key_says_what_its_tokens_are_worth(stack: Stack, gateways: Gateways) -> None:
    logs = {
        path.stem: await asyncio.to_thread(path.read_text) for path in (stack.state_dir / "logs").glob("gateway*.log")
    }
    assert "GATEWAY_PAGE_TOKEN_KEY" in logs["gateway"]
    assert not [name for name, text in logs.items() if KEY["GATEWAY_PAGE_TOKEN_KEY"] in text]
