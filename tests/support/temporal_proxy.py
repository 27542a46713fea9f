"""Proxy in front of a real Temporal server that can imitate a slow, silent or failing server."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

_OWN = ("user-agent", "te", "content-type")
"""Metadata that belongs to one connection and is not forwarded."""


class TemporalProxy(grpc.GenericRpcHandler):
    """Handler that forwards the calls of Temporal's API, all of which are unary."""

    def __init__(self, temporal: grpc.aio.Channel) -> None:
        self.unknown: Counter[str] = Counter()
        """Number of further calls that get NOT_FOUND, by method name."""
        self.refused: set[str] = set()
        """Methods whose calls get RESOURCE_EXHAUSTED."""
        self.api_key = ""
        """The API key that each call must have. Empty: none."""
        self.called: dict[str, list[float]] = defaultdict(list)
        """The times of all calls by the monotonic clock, by method name."""
        self.silent: set[str] = set()
        """Methods whose calls are not answered."""
        self.delays: dict[str, float] = {}
        """Delay of each answer in seconds, by method name."""
        self.lost: dict[str, tuple[grpc.StatusCode, Callable[[], Awaitable[None]]]] = {}
        """The status that the next call gets in place of its answer, and what happens before, by method name."""
        self.meanwhile: dict[str, Callable[[], Awaitable[None]]] = {}
        """What happens between the next call and its answer, by method name."""
        self.running: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        """Maximum number of concurrent calls so far, by method name. `running` is the current number."""
        self._temporal = temporal

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """Return a handler that forwards the called method."""
        method = handler_call_details.method

        async def call(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            name = method.rpartition("/")[2]
            self.called[name].append(time.monotonic())
            given = dict(context.invocation_metadata() or ()).get("authorization")
            if self.api_key and given != f"Bearer {self.api_key}":
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the API key is wrong")
            if name in self.refused:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "namespace rate limit exceeded")
            if self.unknown[name] > 0:
                self.unknown[name] -= 1
                await context.abort(grpc.StatusCode.NOT_FOUND, "sql: no rows in result set")
            self.running[name] += 1
            self.peaks[name] = max(self.peaks[name], self.running[name])
            try:
                if name in self.silent:
                    await asyncio.Event().wait()
                await asyncio.sleep(self.delays.get(name, 0))
            finally:
                self.running[name] -= 1
            metadata = [
                item
                for item in context.invocation_metadata() or ()
                if item[0] not in _OWN and not item[0].startswith("grpc-")
            ]
            try:
                answer: bytes = await self._temporal.unary_unary(method)(
                    request, metadata=metadata, timeout=context.time_remaining()
                )
            except grpc.aio.AioRpcError as error:
                await self._pass_time(name)
                await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
            if name in self.lost:
                code, meanwhile = self.lost.pop(name)
                await meanwhile()
                await context.abort(code, "the answer was lost")
            await self._pass_time(name)
            return answer

        return grpc.unary_unary_rpc_method_handler(call)

    async def _pass_time(self, method: str) -> None:
        if (meanwhile := self.meanwhile.pop(method, None)) is not None:
            await meanwhile()


@asynccontextmanager
async def temporal_proxy(
    address: str, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[tuple[TemporalProxy, str]]:
    """Run a proxy of the server at an address, and yield it with its own address. It has TLS with `credentials`."""
    async with grpc.aio.insecure_channel(address) as temporal:
        proxy, server = TemporalProxy(temporal), grpc.aio.server()
        server.add_generic_rpc_handlers((proxy,))
        own = "127.0.0.1:0"
        port = server.add_secure_port(own, credentials) if credentials else server.add_insecure_port(own)
        await server.start()
        try:
            yield proxy, f"127.0.0.1:{port}"
        finally:
            await server.stop(1)
