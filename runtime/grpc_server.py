"""A gRPC server as every service of the suite runs one: health, reflection, keepalive, graceful shutdown."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from runtime.grpc_parsing import OwnServices
from runtime.grpc_reflection import add_reflection

_log = logging.getLogger(__name__)
_grpc_log = logging.getLogger("grpc._cython.cygrpc")
_MAX_PENDING_CALLS: Final = 20_000
_MAX_PENDING_SECONDS: Final = 24 * 3600
_CHECK_INTERVAL: Final = timedelta(seconds=1)
_CHECK_TIMEOUT: Final = timedelta(seconds=2)


PING_INTERVAL: Final = timedelta(seconds=10)
"""A client may ping so often: as often as gRPC's clients for Go and Java let their users ask for."""


def keepalive_options(max_message_bytes: int, ping_interval: timedelta = PING_INTERVAL) -> list[tuple[str, int]]:
    """Return channel arguments that long, quiet streams survive."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Without these the server answers a client that pings more often than every 5 minutes with GOAWAY.
        ("grpc.http2.min_ping_interval_without_data_ms", ping_interval // timedelta(milliseconds=1)),
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
        max_message_bytes: int,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        ping_interval: timedelta = PING_INTERVAL,
    ) -> None:
        """`ping_interval`: a client that pings more often, again and again, is cut off."""
        options = keepalive_options(max_message_bytes, ping_interval)
        _grpc_log.addFilter(_without_traceback_for_who_left)
        self.server = grpc.aio.server(interceptors=[OwnServices(), *interceptors], options=options)
        self._service = service
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        add_reflection((service, health.SERVICE_NAME), self.server)
        self._address = f"{host}:{port}"

    async def start(self) -> None:
        """Listen, NOT_SERVING yet. Raises RuntimeError naming the address when it is taken."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = self.server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise RuntimeError(f"cannot listen on {self._address}: is it taken? ({error})") from error
        await self.server.start()
        _log.info("listening on %s:%d", self._address.rpartition(":")[0], port)

    async def follow(self, healthy: Callable[[timedelta], Awaitable[bool]]) -> None:
        """Keep health in step with `healthy(timeout)`, asked every second, until cancelled."""
        while True:
            serving = await healthy(_CHECK_TIMEOUT)
            status = health_pb2.HealthCheckResponse
            await self._set(status.SERVING if serving else status.NOT_SERVING)
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())

    async def drain(self) -> None:
        """Say NOT_SERVING from now on, whatever follow finds."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: timedelta) -> None:
        """Take no more calls, and end those that run after the grace."""
        await self.server.stop(grace.total_seconds())

    async def _set(self, status: "health_pb2.HealthCheckResponse.ServingStatus.ValueType") -> None:
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
