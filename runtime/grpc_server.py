"""The gRPC server of a service: health, reflection, keepalive, limits, graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from runtime.addresses import bracketed
from runtime.audit import AuditInterceptor
from runtime.connections import shut_down
from runtime.grpc_auth import AuthInterceptor
from runtime.grpc_health import Health
from runtime.grpc_interceptor import Details, Handler, Interceptor, behavior_of, refuse, with_behavior
from runtime.grpc_parsing import OwnServices
from runtime.grpc_reflection import add_reflection
from runtime.grpc_requests import OneRequest, Unread
from runtime.grpc_telemetry import RpcTelemetryInterceptor
from runtime.health import Readiness
from runtime.request_places import MAX_QUEUED
from runtime.tls import ServerTls, grpc_server_credentials

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
_MAX_METADATA_BYTES: Final = 16 * 1024
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
        # By default gRPC refuses some calls, drawn by chance, whose metadata are over 8 KiB: a token may have as much.
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
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


class GrpcServer:
    """A server whose health follows what it depends on."""

    def __init__(
        self,
        services: Sequence[str],
        host: str,
        port: int,
        limits: Limits,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        details: Details = lambda code, message: (),
        telemetry: RpcTelemetryInterceptor | None = None,
        auth: AuthInterceptor | None = None,
        audit: AuditInterceptor | None = None,
        tls: ServerTls | None = None,
        mtls_port: int | None = None,
        *,
        reflection: bool = False,
    ) -> None:
        """`services` are the names of those whose health and description the server gives. `details` returns the
        details of a refusal, in the form of the services' own errors.

        `telemetry` observes every call, also one that is refused before the `interceptors` see it. `auth` says who
        calls; None: nobody asks. `audit` records every call. `tls`: the files of the server's TLS. None: no TLS. With a
        `mtls_port`, clients need a certificate on that port only, because in gRPC for Python a port either requires
        client certificates or does not ask for them. `reflection`: whether clients may ask for the contract.
        """
        host = bracketed(host)
        _grpc_log.addFilter(_without_traceback_of_gone_client)
        _grpc_log.addFilter(_without_metadata)
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
        self._services = tuple(services)
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        if reflection:
            add_reflection((*services, health.SERVICE_NAME), self.server)
        self._host = host
        self._port = port
        self._tls = tls
        self._mtls_port = mtls_port
        self._ports: list[int] = []

    @property
    def address(self) -> str:
        """Address of the server, as host:port. Valid after start()."""
        return f"{self._host}:{self._port}"

    def serving(self) -> bool:
        """Return whether the server's health is SERVING."""
        return self._health.serving()

    async def start(self, readiness: Readiness | None = None) -> None:
        """Start to listen, with the health NOT_SERVING. `readiness` names the files of TLS while they cannot be used.

        Raises RuntimeError, with the address, if it is taken; OSError when the files of its TLS cannot be used.
        """
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._tls is None or self._mtls_port is None:
            self._port = self._listen(self._port, self._tls, readiness)
        else:
            self._port = self._listen(self._port, replace(self._tls, client_ca=None), None)
            self._listen(self._mtls_port, self._tls, readiness)
        await self.server.start()

    def _listen(self, port: int, tls: ServerTls | None, readiness: Readiness | None) -> int:
        """Return the port, which is another one for 0."""
        credentials = grpc_server_credentials(tls, readiness) if tls is not None else None
        address = f"{self._host}:{port}"
        try:
            if credentials is None:
                port = self.server.add_insecure_port(address)
            else:
                port = self.server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise RuntimeError(f"cannot listen on {address}: is it taken? ({error})") from error
        words = "" if tls is None else " with TLS" if tls.client_ca is None else " with TLS and client certificates"
        _log.info("listening on %s:%d%s", self._host, port, words)
        self._ports.append(port)
        return port

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
            if peers := stalled().union(*(refusals.stalled() for refusals in self._unread)):
                found = await asyncio.to_thread(shut_down, peers, self._ports)
                _log.warning("closed %d connections whose clients have stopped reading", found)

    async def drain(self) -> None:
        """Set the health to NOT_SERVING. follow() does not change it any more."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: timedelta) -> None:
        """Refuse new calls, and end the calls that still run after the grace."""
        await self.server.stop(grace.total_seconds())

    async def _set(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in (health.OVERALL_HEALTH, *self._services):
            await self._health.set(name, status)


def _without_traceback_of_gone_client(record: logging.LogRecord) -> bool:
    """Log in one line of INFO, without a traceback, that an answer could not be sent to a client that has gone.

    gRPC reports it as an error of the server if the send fails before the end of the connection is noticed.
    """
    if record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError):
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        record.exc_info = None
    return True


def _without_metadata(record: logging.LogRecord) -> bool:
    """Drop what gRPC logs of metadata that is no UTF-8: the whole value, which may be a credential, and a traceback."""
    return not str(record.msg).startswith("Invalid encoding on ")


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
