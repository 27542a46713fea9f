"""Ways to see that a process is ready. Each looks once and answers within about a second."""

import asyncio
import re
from collections.abc import Collection
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest, ListSearchAttributesResponse

from deploy.local.process import Probe, Process

_TIMEOUT: Final = 1.0
_READY_LINE: Final = re.compile(r'\bready(?:"|\s*$)', re.MULTILINE)
CHANNEL_OPTIONS: Final = (("grpc.enable_http_proxy", 0),)
"""For every gRPC channel on the loopback interface: the user's proxy must not be asked for it."""


def listens(address: str) -> Probe:
    """Return a probe that succeeds once the address accepts a connection."""
    host, port = address.rsplit(":", 1)

    async def probe(_: Process) -> bool:
        try:
            async with asyncio.timeout(_TIMEOUT):
                writer = (await asyncio.open_connection(host, int(port)))[1]
        except OSError:  # TimeoutError is one
            return False
        writer.close()
        return True

    return probe


async def logs_ready(process: Process) -> bool:
    """Succeed once the run has logged a message that ends with ready: the sign of a process that only polls."""
    return _READY_LINE.search(process.log) is not None


def serves_grpc(address: str) -> Probe:
    """Return a probe that succeeds once gRPC's health service says SERVING for the whole server."""

    async def probe(_: Process) -> bool:
        async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            try:
                answer = await check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return probe


def has_search_attributes(address: str, names: Collection[str]) -> Probe:
    """Return a probe that succeeds once Temporal's namespace `default` knows all these search attributes.

    The development server answers before it has registered them; a job started in between would be refused.
    """

    async def probe(_: Process) -> bool:
        async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
            # Not OperatorServiceStub, whose types are those of a blocking channel.
            list_attributes = channel.unary_unary(
                "/temporal.api.operatorservice.v1.OperatorService/ListSearchAttributes",
                request_serializer=ListSearchAttributesRequest.SerializeToString,
                response_deserializer=ListSearchAttributesResponse.FromString,
            )
            try:
                answer = await list_attributes(ListSearchAttributesRequest(namespace="default"), timeout=_TIMEOUT)
            except grpc.aio.AioRpcError:
                return False
        return set(names) <= set(answer.custom_attributes)

    return probe
