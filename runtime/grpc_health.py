"""The service grpc.health.v1 of a server."""

import asyncio
from typing import Any

from grpc_health.v1 import health, health_pb2


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # without type information
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
