"""The connection to Temporal follows its settings, and a NOT_FOUND of Temporal is verified."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import grpc
import pytest
from opentelemetry.metrics import NoOpMeter
from pydantic import ValidationError
from temporalio.client import Client, WorkflowExecutionCount
from temporalio.runtime import Runtime
from temporalio.service import GrpcCompression

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime import temporal
from runtime.health import Readiness
from services.gateway.models.catalogue import Models
from services.gateway.open_jobs import OpenJobs
from services.gateway.settings import GatewaySettings
from tests.support.jobs import new_job, run_job, watch
from tests.support.temporal_proxy import TemporalProxy, temporal_proxy


@pytest.mark.parametrize(("setting", "used"), [(None, GrpcCompression.NONE), ("gzip", GrpcCompression.GZIP)])
async def test_calls_are_compressed_as_set(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, setting: str | None, used: GrpcCompression
) -> None:
    """The server accepts both. Requests are compressed only if the setting asks for it."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", stack.address("temporal"))
    if setting is not None:
        monkeypatch.setenv("TEMPORAL_GRPC_COMPRESSION", setting)
    client = await temporal.connect(Runtime.default(), Readiness("test"))
    assert client.service_client.config.grpc_compression is used
    assert isinstance(await client.count_workflows(), WorkflowExecutionCount)


async def test_an_unknown_compression_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPORAL_GRPC_COMPRESSION", "zstd")
    with pytest.raises(ValidationError, match="'none' or 'gzip'"):
        await temporal.connect(Runtime.default(), Readiness("test"))


@pytest.fixture(scope="module")
async def doubtful(stack: Stack) -> AsyncIterator[tuple[TemporalProxy, LlmServiceStub]]:
    """Run a gateway that reaches Temporal through a proxy, and yield the proxy and a client."""
    async with temporal_proxy(stack.address("temporal")) as (proxy, address):
        gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "TEMPORAL_ADDRESS": address})
        await gateway.start()
        await gateway.wait_ready()
        async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
            yield proxy, LlmServiceStub(channel)
        await gateway.terminate()


async def test_one_not_found_of_temporals_is_not_believed(doubtful: tuple[TemporalProxy, LlmServiceStub]) -> None:
    """Temporal briefly returns NOT_FOUND when its database cancels a query, so the gateway asks once more."""
    proxy, stub = doubtful
    proxy.unknown["DescribeWorkflowExecution"] = 1
    seen = await run_job(stub, new_job(params={"max_tokens": 5}))
    assert seen.states[-1] == "SUCCEEDED"
    assert proxy.unknown["DescribeWorkflowExecution"] == 0

    proxy.unknown["DescribeWorkflowExecution"] = 2
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=seen.final.status.workflow_id))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("ended", [False, True])
async def test_calls_on_one_job_share_what_temporal_says(
    doubtful: tuple[TemporalProxy, LlmServiceStub], ended: bool
) -> None:
    """However many there are, Temporal gets few of them at a time, so that it has time for others."""
    proxy, stub = doubtful
    job = new_job(model="docstrings" if ended else "idle", params={"max_tokens": 5})
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    if ended:
        await watch(stub, id_)
    methods = ("DescribeWorkflowExecution", "GetWorkflowExecutionHistory", "QueryWorkflow")
    proxy.peaks.clear()
    proxy.delays = dict.fromkeys(methods, 0.3)
    looks = (stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=60) for _ in range(100))
    answers = await asyncio.gather(*looks)
    if ended:
        lists = (stub.ListDeliveries(llm_pb2.ListDeliveriesRequest(workflow_id=id_), timeout=60) for _ in range(100))
        await asyncio.gather(*lists)
        cancels = (stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_), timeout=60) for _ in range(100))
        answers += await asyncio.gather(*cancels)
    proxy.delays = {}
    assert {answer.status.state for answer in answers} == {
        llm_pb2.JOB_STATE_SUCCEEDED if ended else llm_pb2.JOB_STATE_QUEUED
    }
    assert max(proxy.peaks[method] for method in methods) <= 3
    assert proxy.peaks["SignalWorkflowExecution"] == 0
    if not ended:
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


async def test_a_cancel_that_temporal_lost_is_sent_again(doubtful: tuple[TemporalProxy, LlmServiceStub]) -> None:
    """Temporal also returns NOT_FOUND for an ended workflow. Only the job's state distinguishes the two."""
    proxy, stub = doubtful
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 8000})))).workflow_id
    proxy.unknown["SignalWorkflowExecution"] = 1
    asked = await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    assert asked.status.cancel_requested
    assert (await watch(stub, id_)).states[-1] == "CANCELLED"

    again = await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    assert again.status.state == llm_pb2.JOB_STATE_CANCELLED


async def test_a_count_that_temporal_refuses_is_tried_less_often(stack: Stack) -> None:
    """List needs the requests that visibility accepts, and gateways do not know how many they are."""
    async with temporal_proxy(stack.address("temporal")) as (proxy, address):
        proxy.refused.add("CountWorkflowExecutions")
        client = await Client.connect(address)
        models, meter = Models(GatewaySettings().models), NoOpMeter("test")
        counting = asyncio.create_task(OpenJobs(client, models, meter).keep_counting(timedelta(seconds=1)))
        calls = proxy.called["CountWorkflowExecutions"]
        async with asyncio.timeout(60):
            while len(calls) < 3:  # noqa: ASYNC110  the proxy only notes them
                await asyncio.sleep(0.1)
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
    assert calls[1] - calls[0] >= 2
    assert calls[2] - calls[1] >= 4
