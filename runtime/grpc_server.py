"""A gRPC server as every service of the suite runs one: health, reflection, keepalive, graceful shutdown."""

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

from runtime.audit import AuditInterceptor
from runtime.connections import shut_down
from runtime.grpc_auth import AuthInterceptor
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
    # Each may hold the whole contract unread.
    "/grpc.reflection.": 32,
    # They last for as long as their clients like.
    "/grpc.health.v1.Health/Watch": 100,
    # More than come within the time after which one that is not read is ended.
    "/grpc.health.": 4000,
}
"""Maximum of calls at once of health and reflection, by the beginning of their methods' names."""
_MAX_UNREAD: Final = 100
"""Answers of health and reflection that may be unread for longer than a moment."""
_MAX_UNREAD_OF_PEER: Final = 500
"""Answers of health and reflection that one connection may leave unread at all."""
_COMING_BYTES: Final = 64 * 1024 * 1024
"""What gRPC may hold of requests that have not come whole."""
_WINDOW_BYTES: Final = 16 * 1024
"""What a client may send before the server asks for it. gRPC's own choice grows to 128 MiB for each call."""

PING_INTERVAL: Final = timedelta(seconds=10)
"""A client may ping so often: as often as gRPC's clients for Go and Java let their users ask for."""


@dataclass(frozen=True)
class Limits:
    """What clients may ask of a server. Times of zero are no limits."""

    max_message_bytes: int
    """Largest message taken or sent."""
    max_calls: int = 5000
    """Calls of the service at once. Some more are taken: of health and reflection, and such as have no request yet."""
    max_calls_per_connection: int = 2000
    """More wait at the client, as HTTP/2 has it."""
    ping_interval: timedelta = PING_INTERVAL
    """A client that pings more often, again and again, is cut off."""
    request_timeout: timedelta = timedelta(seconds=20)
    """A call is ended whose request has not come by then."""
    request_idle: timedelta = timedelta(minutes=1)
    """A call that streams requests is ended when none has come for so long."""
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
        # Requests that are larger cost a round trip or two more, of which the client notices little.
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),
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
    """The library's, with the one method that it lacks, and answers with a traceback, and one of its own.

    Its Watch holds a lock while it sends: one client that does not read would keep the health of the server as it is,
    and the server from stopping.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802  the library's
        """Send the health of a name, and again whenever it changes."""
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
        """Return whether the server as a whole says SERVING."""
        return bool(self._server_status.get(health.OVERALL_HEALTH) == health_pb2.HealthCheckResponse.SERVING)

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
        details: Details = lambda code, message: (),
        telemetry: RpcTelemetryInterceptor | None = None,
        auth: AuthInterceptor | None = None,
        audit: AuditInterceptor | None = None,
        *,
        reflection: bool = False,
    ) -> None:
        """`details`: what refusals of this server carry, like the service's own errors.

        `telemetry` observes every call, those too that are refused before the `interceptors` see them. `auth` says who
        calls; None: nobody asks. `audit` records every call. `reflection`: whether clients may ask for the contract.
        """
        _grpc_log.addFilter(_without_traceback_for_who_left)
        places = max(8, _COMING_BYTES // limits.max_message_bytes)
        self._requests = OneRequest(limits.request_timeout, limits.request_idle, places, details)
        self._own_calls = _OwnCalls(details)
        self.server = grpc.aio.server(
            interceptors=[
                *([telemetry] if telemetry is not None else ()),
                *([audit] if audit is not None else ()),
                *([auth] if auth is not None else ()),
                self._requests,
                OwnServices(details),
                *interceptors,
                self._own_calls,
            ],
            options=channel_options(limits),
            maximum_concurrent_rpcs=limits.max_calls + sum(_OWN_CALLS.values()) + MAX_QUEUED + places,
        )
        self._unread = [self._own_calls.unread, self._requests.unread, *([auth.unread] if auth is not None else ())]
        self._service = service
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        if reflection:
            add_reflection((service, health.SERVICE_NAME), self.server)
        self._address = f"{host}:{port}"
        self._port = port

    @property
    def address(self) -> str:
        """Where it listens, as host:port. Valid after start()."""
        return f"{self._address.rpartition(':')[0]}:{self._port}"

    def serving(self) -> bool:
        """Return whether its health is SERVING."""
        return self._health.serving()

    async def start(self) -> None:
        """Listen, NOT_SERVING yet. Raises RuntimeError naming the address when it is taken."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self._port = self.server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise RuntimeError(f"cannot listen on {self._address}: is it taken? ({error})") from error
        await self.server.start()
        _log.info("listening on %s", self.address)

    async def follow(self, healthy: Callable[[timedelta], Awaitable[bool]]) -> None:
        """Keep health in step with `healthy(timeout)`, asked every second, until cancelled."""
        while True:
            serving = await healthy(_CHECK_TIMEOUT)
            status = health_pb2.HealthCheckResponse
            await self._set(status.SERVING if serving else status.NOT_SERVING)
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())

    async def close_stalled(self, stalled: Callable[[], set[str]]) -> None:
        """Close the connections of the peers that `stalled()` names, asked every second, until cancelled.

        And of those that do not take refusals, or answers of health and reflection.
        """
        while True:
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())
            if peers := stalled().union(*(refusals.stalled() for refusals in self._unread)):
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


class _OwnCalls(Interceptor):
    """Refuses calls of health and reflection beyond their number with RESOURCE_EXHAUSTED, and counts unread answers.

    For every call takes one of the places that the server has, and keeps it until its answer has left.
    """

    def __init__(self, details: Details) -> None:
        self._details = details
        self._calls: Counter[str] = Counter()
        self.unread = Unread(_MAX_UNREAD)
        """The answers."""

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
                # Goes on once gRPC has sent it.
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
