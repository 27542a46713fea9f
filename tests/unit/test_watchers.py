"""The streams that a gateway serves, of each kind."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any, cast

import pytest

from llm_pb import batch_pb2
from runtime.answers import Answer
from runtime.auth import Caller
from services.gateway.batches.reader import BatchReader
from services.gateway.batches.results import BatchStreams
from services.gateway.errors import ApiError
from services.gateway.settings import GatewaySettings
from services.gateway.streams.watchers import Watchers


async def test_a_tenant_leaves_streams_to_the_others() -> None:
    watchers = Watchers(GatewaySettings(max_watchers=3, max_watchers_per_tenant=2), "jobs")
    async with AsyncExitStack() as stack:
        for caller in (Caller("acme", "a", frozenset()), Caller("acme", "b", frozenset())):
            await stack.enter_async_context(watchers.acquired(caller))
        with pytest.raises(ApiError, match="2 streams watch this tenant's jobs"):
            await stack.enter_async_context(watchers.acquired(Caller("acme", "c", frozenset())))
        await stack.enter_async_context(watchers.acquired(Caller("beta", "d", frozenset())))
        with pytest.raises(ApiError, match="3 streams, its limit"):
            await stack.enter_async_context(watchers.acquired(Caller("", "e", frozenset())))


async def test_streams_of_batches_count_for_their_tenant() -> None:
    """Each of them asks Temporal once a second."""

    class Waiting:
        async def status(self, _caller: Caller, _id: str) -> Any:
            await asyncio.Event().wait()

    settings = GatewaySettings(max_watchers=10, max_watchers_per_tenant=1)
    streams = BatchStreams(cast("BatchReader", Waiting()), None, settings)
    caller, request = Caller("acme", "a", frozenset()), batch_pb2.StreamBatchRequest(batch_id="llmbatch--acme-a-1")
    first = asyncio.ensure_future(anext(streams.watch(caller, request, cast("Answer", None))))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        with pytest.raises(ApiError, match="this tenant's batches"):
            await anext(streams.watch(caller, request, cast("Answer", None)))
    first.cancel()
    await asyncio.wait([first])
