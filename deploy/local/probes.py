"""Ways to see that a process is ready. Each looks once and answers within a few seconds."""

import asyncio
import ssl
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from typing import Final

import aiohttp
import grpc
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest, ListSearchAttributesResponse

from deploy.local.process import Probe, Process

_TIMEOUT: Final = 1.0
_READY_TIMEOUT: Final = 5.0
"""Longer than a service takes to find out that something does not answer."""
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


def is_ready(address: str, ca: Path | None = None) -> Probe:
    """Return a probe that succeeds once a service says so at /readyz beside its metrics; with a `ca`, by HTTPS."""

    url, timeout = (
        f"{'http' if ca is None else 'https'}://{address}/readyz",
        aiohttp.ClientTimeout(total=_READY_TIMEOUT),
    )

    async def probe(_: Process) -> bool:
        try:
            context = ssl.create_default_context(cafile=ca) if ca is not None else True
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, ssl=context) as answer:
                return answer.status == HTTPStatus.OK
        except (aiohttp.ClientError, TimeoutError):
            return False

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
