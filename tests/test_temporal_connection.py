"""The connection to Temporal takes its settings, and what comes over it is not believed too soon."""

import grpc
import pytest
from pydantic import ValidationError
from temporalio.client import WorkflowExecutionCount
from temporalio.runtime import Runtime
from temporalio.service import GrpcCompression

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime import temporal
from tests.conftest import new_job, run_job
from tests.temporal_proxy import temporal_proxy


@pytest.mark.parametrize(("setting", "used"), [(None, GrpcCompression.NONE), ("gzip", GrpcCompression.GZIP)])
async def test_calls_are_compressed_as_set(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, setting: str | None, used: GrpcCompression
) -> None:
    """The server takes both; what is sent is not compressed unless asked for."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", stack.address("temporal"))
    if setting is not None:
        monkeypatch.setenv("TEMPORAL_GRPC_COMPRESSION", setting)
    client = await temporal.connect(Runtime.default())
    assert client.service_client.config.grpc_compression is used
    assert isinstance(await client.count_workflows(), WorkflowExecutionCount)


async def test_an_unknown_compression_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPORAL_GRPC_COMPRESSION", "zstd")
    with pytest.raises(ValidationError, match="'none' or 'gzip'"):
        await temporal.connect(Runtime.default())


async def test_one_not_found_of_temporals_is_not_believed(stack: Stack) -> None:
    """A database that gives a query up makes Temporal forget what it knows for a moment: it is asked once more."""
    async with temporal_proxy(stack.address("temporal")) as (proxy, address):
        gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "TEMPORAL_ADDRESS": address})
        await gateway.start()
        await gateway.wait_ready()
        async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
            stub = LlmServiceStub(channel)
            proxy.unknown["DescribeWorkflowExecution"] = 1
            seen = await run_job(stub, new_job(params={"max_tokens": 5}))
            assert seen.states[-1] == "SUCCEEDED"
            assert proxy.unknown["DescribeWorkflowExecution"] == 0

            proxy.unknown["DescribeWorkflowExecution"] = 2
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=seen.final.status.workflow_id))
            assert error.value.code() == grpc.StatusCode.NOT_FOUND
        await gateway.terminate()
