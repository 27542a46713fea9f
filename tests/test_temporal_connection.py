"""The connection to Temporal takes its settings."""

import pytest
from pydantic import ValidationError
from temporalio.client import WorkflowExecutionCount
from temporalio.runtime import Runtime
from temporalio.service import GrpcCompression

from deploy.local.stack import Stack
from runtime import temporal


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
