"""Probes that check whether a process is ready. Each checks once and returns within a few seconds."""

import asyncio
import ssl
import time
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from typing import Final

import aiohttp
import grpc
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest, ListSearchAttributesResponse

from deploy.local.process import Probe, Process

_TIMEOUT: Final = 1.0
_DEGRADED_SECONDS: Final = 5.0
"""Maximum wait for a service that is ready to connect to what it can do without."""
_READY_TIMEOUT: Final = 5.0
"""Seconds. A service needs less to detect that another server does not answer."""
CHANNEL_OPTIONS: Final = (("grpc.enable_http_proxy", 0),)
"""Options of every gRPC channel on the loopback interface, which must not go through the user's proxy."""


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
    """Return a probe that succeeds once a service says so at /readyz, on the port of its metrics.

    With a `ca` it speaks HTTPS. A service is ready without the feed, which it reports as degraded. It gets a few
    seconds to connect, so that the first job's tokens are not lost.
    """
    url = f"{'http' if ca is None else 'https'}://{address}/readyz"
    timeout = aiohttp.ClientTimeout(total=_READY_TIMEOUT)
    ready_since: float | None = None

    async def probe(_: Process) -> bool:
        nonlocal ready_since
        try:
            context = ssl.create_default_context(cafile=ca) if ca is not None else True
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, ssl=context) as answer:
                if answer.status != HTTPStatus.OK:
                    ready_since = None
                    return False
                # An earlier version has no /readyz, and serves its metrics at every path.
                degraded = answer.content_type == "application/json" and (await answer.json()).get("degraded")
        except (aiohttp.ClientError, TimeoutError):
            ready_since = None
            return False
        now = time.monotonic()
        if ready_since is None:
            ready_since = now
        return not degraded or now - ready_since > _DEGRADED_SECONDS

    return probe


def has_search_attributes(address: str, names: Collection[str]) -> Probe:
    """Return a probe that succeeds once Temporal's namespace `default` knows all these search attributes.

    The development server answers before it has registered them, and would refuse a job that started then.
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
