"""A gRPC server as every service of the suite runs one: health, reflection, keepalive, graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from runtime.connections import shut_down
from runtime.grpc_parsing import OwnServices
from runtime.grpc_reflection import add_reflection
from runtime.grpc_requests import OneRequest

_log = logging.getLogger(__name__)
_grpc_log = logging.getLogger("grpc._cython.cygrpc")
_MAX_PENDING_CALLS: Final = 20_000
_MAX_PENDING_SECONDS: Final = 24 * 3600
_CHECK_INTERVAL: Final = timedelta(seconds=1)
_CHECK_TIMEOUT: Final = timedelta(seconds=2)


_REFLECTION: Final = "/grpc.reflection."
_MAX_REFLECTION_CALLS: Final = 32
"""Each may hold the whole contract unread."""
_OTHER_CALLS: Final = 1000
"""Calls of health and reflection beside those of the service."""

PING_INTERVAL: Final = timedelta(seconds=10)
"""A client may ping so often: as often as gRPC's clients for Go and Java let their users ask for."""


@dataclass(frozen=True)
class Limits:
    """What clients may ask of a server. Times of zero are no limits."""

    max_message_bytes: int
    """Largest message taken or sent."""
    max_calls: int = 5000
    """Calls of the service at once. Some more are taken, for health and reflection; then gRPC refuses all."""
    max_calls_per_connection: int = 2000
    """More wait at the client, as HTTP/2 has it."""
    ping_interval: timedelta = PING_INTERVAL
    """A client that pings more often, again and again, is cut off."""
    request_timeout: timedelta = timedelta(seconds=20)
    """A call is ended whose request has not come by then."""
    connection_idle: timedelta = timedelta(0)
    """A connection without calls is closed after this time."""
    connection_age: timedelta = timedelta(0)
    """A client is asked to open a new connection after this time; calls that run go on."""


def channel_options(limits: Limits) -> list[tuple[str, int]]:
    """Return channel arguments that long, quiet streams survive."""
    options = [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_concurrent_streams", limits.max_calls_per_connection),
        # Without these the server answers a client that pings more often than every 5 minutes with GOAWAY.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(limits.ping_interval)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Finds out about clients that went away without a word.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Calls that come faster than they are taken up wait here, after a restart those of every watcher. By default
        # some beyond 1,000 are cancelled, which clients do not take for a reason to call again.
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
        # Nor are those that have waited for 30 s cancelled, as by default: how long it waits is the client's choice.
        ("grpc.server_max_unrequested_time_in_server", _MAX_PENDING_SECONDS),
        # A port that is taken is an error, not shared.
        ("grpc.so_reuseport", 0),
    ]
    if limits.connection_idle:
        options.append(("grpc.max_connection_idle_ms", _milliseconds(limits.connection_idle)))
    if limits.connection_age:
        # Without a grace: by default it is infinite, so that streams may last for hours.
        options.append(("grpc.max_connection_age_ms", _milliseconds(limits.connection_age)))
    return options


class _Health(health.aio.HealthServicer):  # type: ignore[misc]  # without type information
    """The library's, with the one method that it lacks, and answers with a traceback."""

    async def List(self, request: health_pb2.HealthListRequest, context: object) -> health_pb2.HealthListResponse:
        """Return the health of every name that has one."""
        known = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=known)


class GrpcServer:
    """A server whose health follows what it depends on."""

    def __init__(
        self,
        service: str,
        host: str,
        port: int,
        limits: Limits,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        _grpc_log.addFilter(_without_traceback_for_who_left)
        self.server = grpc.aio.server(
            interceptors=[OneRequest(limits.request_timeout), OwnServices(), *interceptors, _ReflectionLimit()],
            options=channel_options(limits),
            maximum_concurrent_rpcs=limits.max_calls + _OTHER_CALLS,
        )
        self._service = service
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        add_reflection((service, health.SERVICE_NAME), self.server)
        self._address = f"{host}:{port}"
        self._port = port

    async def start(self) -> None:
        """Listen, NOT_SERVING yet. Raises RuntimeError naming the address when it is taken."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self._port = self.server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise RuntimeError(f"cannot listen on {self._address}: is it taken? ({error})") from error
        await self.server.start()
        _log.info("listening on %s:%d", self._address.rpartition(":")[0], self._port)

    async def follow(self, healthy: Callable[[timedelta], Awaitable[bool]]) -> None:
        """Keep health in step with `healthy(timeout)`, asked every second, until cancelled."""
        while True:
            serving = await healthy(_CHECK_TIMEOUT)
            status = health_pb2.HealthCheckResponse
            await self._set(status.SERVING if serving else status.NOT_SERVING)
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())

    async def close_stalled(self, stalled: Callable[[], set[str]]) -> None:
        """Close the connections of the peers that `stalled()` names, asked every second, until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())
            if peers := stalled():
                found = await asyncio.to_thread(shut_down, peers, self._port)
                _log.warning("closed %d connections whose clients have stopped reading", found)

    async def drain(self) -> None:
        """Say NOT_SERVING from now on, whatever follow finds."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: timedelta) -> None:
        """Take no more calls, and end those that run after the grace."""
        await self.server.stop(grace.total_seconds())

    async def _set(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in (health.OVERALL_HEALTH, self._service):
            await self._health.set(name, status)


def _without_traceback_for_who_left(record: logging.LogRecord) -> bool:
    """Say in one line of INFO that an answer could not be sent: gRPC takes that for an error of the server.

    It knows better only when the client's leaving has reached it before the failure of what was being sent.
    """
    if record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError):
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        record.exc_info = None
    return True


class _ReflectionLimit(grpc.aio.ServerInterceptor):
    """Refuses reflection calls beyond a few with RESOURCE_EXHAUSTED."""

    def __init__(self) -> None:
        self._calls = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_REFLECTION):
            return handler
        handle: Any = handler.stream_stream

        async def limited(requests: Any, context: Any) -> AsyncIterator[Any]:
            if self._calls >= _MAX_REFLECTION_CALLS:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many reflection calls; call again")
            self._calls += 1
            context.add_done_callback(self._leave)
            async for response in handle(requests, context):
                yield response

        return grpc.stream_stream_rpc_method_handler(limited, handler.request_deserializer, handler.response_serializer)

    def _leave(self, _: object) -> None:
        self._calls -= 1


def _milliseconds(time: timedelta) -> int:
    return time // timedelta(milliseconds=1)
