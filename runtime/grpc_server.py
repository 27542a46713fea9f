"""The gRPC server of a service: health, reflection, keepalive, limits, graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from runtime.addresses import bracketed
from runtime.connections import shut_down
from runtime.grpc_interceptor import Details, Handler, Interceptor, behavior_of, refuse, with_behavior
from runtime.grpc_parsing import OwnServices
from runtime.grpc_reflection import add_reflection
from runtime.grpc_requests import MAX_QUEUED, OneRequest, Unread
from runtime.grpc_telemetry import RpcTelemetryInterceptor

_log = logging.getLogger(__name__)
_grpc_log = logging.getLogger("grpc._cython.cygrpc")
_MAX_PENDING_CALLS: Final = 20_000
_MAX_PENDING_SECONDS: Final = 24 * 3600
_CHECK_INTERVAL: Final = timedelta(seconds=1)
_CHECK_TIMEOUT: Final = timedelta(seconds=2)


_OWN_CALLS: Final = {
    # The unread answer of each may be the whole contract.
    "/grpc.reflection.": 32,
    # Their clients decide how long they last.
    "/grpc.health.v1.Health/Watch": 100,
    # More than arrive before an unread one is ended.
    "/grpc.health.": 4000,
}
"""Maximum number of concurrent calls of health and reflection, by the prefix of their methods' names."""
_MAX_UNREAD: Final = 100
"""Maximum number of answers of health and reflection that stay unread for longer than a moment."""
_MAX_UNREAD_OF_PEER: Final = 500
"""Maximum number of unread answers of health and reflection on one connection."""
_COMING_BYTES: Final = 64 * 1024 * 1024
"""Maximum memory of gRPC for incomplete requests, in bytes."""
_WINDOW_BYTES: Final = 16 * 1024
"""Number of bytes that a client may send before the server reads them. By default it grows to 128 MiB for each call."""

PING_INTERVAL: Final = timedelta(seconds=10)
"""Default of Limits.ping_interval: the shortest interval that gRPC's clients for Go and Java accept."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server. A time of zero is no limit."""

    max_message_bytes: int
    """Maximum size of a message in either direction, in bytes."""
    max_calls: int = 5000
    """Maximum number of concurrent calls of the service. Calls of health and reflection do not count, nor do calls that
    wait for their request."""
    max_calls_per_connection: int = 2000
    """Maximum number of concurrent calls on one connection. Further calls wait at the client."""
    ping_interval: timedelta = PING_INTERVAL
    """Minimum time between two pings of a client. A client that repeatedly pings more often loses its connection."""
    request_timeout: timedelta = timedelta(seconds=20)
    """Maximum wait for the request of a call. The server then ends the call."""
    request_idle: timedelta = timedelta(minutes=1)
    """Maximum time between two requests of a call that streams them. The server then ends the call."""
    connection_idle: timedelta = timedelta(0)
    """Time after which a connection without calls is closed."""
    connection_age: timedelta = timedelta(0)
    """Time after which a client is asked to open a new connection. Its running calls continue."""


def channel_options(limits: Limits) -> list[tuple[str, int]]:
    """Return channel arguments that long, quiet streams survive."""
    options = [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_concurrent_streams", limits.max_calls_per_connection),
        # A larger request costs a round trip or two more, which a client hardly notices.
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),
        # By default gRPC sends GOAWAY to a client that pings more often than every 5 minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(limits.ping_interval)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Detects clients that have gone without closing their connection.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Calls that arrive faster than they are accepted wait here. After a restart they are those of all watchers.
        # By default gRPC cancels some beyond 1,000, and clients do not retry a call that was cancelled.
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
        # By default gRPC cancels calls that have waited for 30 s. The deadline of the client decides.
        ("grpc.server_max_unrequested_time_in_server", _MAX_PENDING_SECONDS),
        # A port that is taken is an error, not shared.
        ("grpc.so_reuseport", 0),
    ]
    if limits.connection_idle:
        options.append(("grpc.max_connection_idle_ms", _milliseconds(limits.connection_idle)))
    if limits.connection_age:
        # The grace keeps its default, which is infinite, because streams may last for hours.
        options.append(("grpc.max_connection_age_ms", _milliseconds(limits.connection_age)))
    return options


class _Health(health.aio.HealthServicer):  # type: ignore[misc]  # without type information
    """The library's servicer with another Watch, and with List, which the library answers with a traceback.

    The library's Watch holds a lock while it sends. A client that does not read would block every change of the
    server's health, and its stop.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802  the library's
        """Send the health of a service, and send it again whenever it changes."""
        sent = None
        while True:
            changed = self._changed
            status = self._server_status.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            else:
                await changed.wait()

    async def _set(self, service: str, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        if self._server_status.get(service) != status:
            self._server_status[service] = status
            self._changed.set()
            self._changed = asyncio.Event()

    def serving(self) -> bool:
        """Return whether the health of the whole server is SERVING."""
        return bool(self._server_status.get(health.OVERALL_HEALTH) == health_pb2.HealthCheckResponse.SERVING)

    async def List(self, request: health_pb2.HealthListRequest, context: object) -> health_pb2.HealthListResponse:
        """Return the health of every service that has one."""
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
        details: Details = lambda code, message: (),
        telemetry: RpcTelemetryInterceptor | None = None,
    ) -> None:
        """`details` returns the details of a refusal, in the form of the service's own errors.

        `telemetry` observes every call, also one that is refused before the `interceptors` see it.
        """
        host = bracketed(host)
        _grpc_log.addFilter(_without_traceback_of_gone_client)
        places = max(8, _COMING_BYTES // limits.max_message_bytes)
        self._requests = OneRequest(limits.request_timeout, limits.request_idle, places, details)
        self._own_calls = _OwnCalls(details)
        self.server = grpc.aio.server(
            interceptors=[
                *([telemetry] if telemetry is not None else ()),
                self._requests,
                OwnServices(details),
                *interceptors,
                self._own_calls,
            ],
            options=channel_options(limits),
            maximum_concurrent_rpcs=limits.max_calls + sum(_OWN_CALLS.values()) + MAX_QUEUED + places,
        )
        self._service = service
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        add_reflection((service, health.SERVICE_NAME), self.server)
        self._address = f"{host}:{port}"
        self._port = port

    @property
    def address(self) -> str:
        """Address of the server, as host:port. Valid after start()."""
        return f"{self._address.rpartition(':')[0]}:{self._port}"

    def serving(self) -> bool:
        """Return whether the server's health is SERVING."""
        return self._health.serving()

    async def start(self) -> None:
        """Start to listen, with the health NOT_SERVING. Raises RuntimeError, with the address, if it is taken."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self._port = self.server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise RuntimeError(f"cannot listen on {self._address}: is it taken? ({error})") from error
        await self.server.start()
        _log.info("listening on %s", self.address)

    async def follow(self, healthy: Callable[[timedelta], Awaitable[bool]]) -> None:
        """Set the health by `healthy(timeout)`, which is called every second, until cancelled."""
        while True:
            serving = await healthy(_CHECK_TIMEOUT)
            status = health_pb2.HealthCheckResponse
            await self._set(status.SERVING if serving else status.NOT_SERVING)
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())

    async def close_stalled(self, stalled: Callable[[], set[str]]) -> None:
        """Close the connections of the peers that `stalled()` returns, every second, until cancelled.

        The connections of peers that do not read refusals, or answers of health and reflection, are closed as well.
        """
        while True:
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())
            if peers := stalled() | self._own_calls.unread.stalled() | self._requests.unread.stalled():
                found = await asyncio.to_thread(shut_down, peers, self._port)
                _log.warning("closed %d connections whose clients have stopped reading", found)

    async def drain(self) -> None:
        """Set the health to NOT_SERVING. follow() does not change it any more."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: timedelta) -> None:
        """Refuse new calls, and end the calls that still run after the grace."""
        await self.server.stop(grace.total_seconds())

    async def _set(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in (health.OVERALL_HEALTH, self._service):
            await self._health.set(name, status)


def _without_traceback_of_gone_client(record: logging.LogRecord) -> bool:
    """Log in one line of INFO, without a traceback, that an answer could not be sent to a client that has gone.

    gRPC reports it as an error of the server if the send fails before the end of the connection is noticed.
    """
    if record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError):
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        record.exc_info = None
    return True


class _OwnCalls(Interceptor):
    """Refuses calls of health and reflection beyond their maximum with RESOURCE_EXHAUSTED, and counts unread answers.

    Every call takes one of the server's places until its answer has been sent.
    """

    def __init__(self, details: Details) -> None:
        self._details = details
        self._calls: Counter[str] = Counter()
        self.unread = Unread(_MAX_UNREAD)
        """The unread answers."""

    def wrap(self, handler: Handler, call: grpc.HandlerCallDetails) -> Handler:
        """Wrap the handler of a call."""
        kind = next((name for name in _OWN_CALLS if call.method.startswith(name)), None)
        if kind is None:
            return handler
        handle = behavior_of(handler)

        async def unary(request: Any, context: Any) -> Any:
            await self._enter(kind, context)
            response = await handle(request, context)
            self.unread.add(context)
            return response

        async def watch(request: Any, context: Any) -> None:
            await self._enter(kind, context)
            await handle(request, context)

        async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
            await self._enter(kind, context)
            async for response in handle(requests, context):
                self.unread.add(context)
                # The generator continues once gRPC has sent the response.
                yield response
                self.unread.remove(context)

        return with_behavior(
            handler, stream if handler.request_streaming else watch if handler.response_streaming else unary
        )

    async def _enter(self, kind: str, context: Any) -> None:
        if self._calls[kind] >= _OWN_CALLS[kind] or self.unread.of_peer[context.peer()] >= _MAX_UNREAD_OF_PEER:
            code, message = grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls of health or reflection; call again"
            await refuse(context, code, message, self._details)
        self._calls[kind] += 1

        def leave(_: object) -> None:
            self._calls[kind] -= 1
            self.unread.remove(context)

        context.add_done_callback(leave)


def _milliseconds(time: timedelta) -> int:
    return time // timedelta(milliseconds=1)
