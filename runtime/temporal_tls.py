"""The connection to Temporal, replaced when the files of its TLS change.

Temporal's SDK reads the files once, and would continue with certificates that have expired meanwhile. A plugin puts a
service client between the SDK's Client and the connection, in which the connection can be replaced. Running calls end
on the old connection. So do polls of workers, which last a minute at most.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from temporalio.envconfig import ClientConfigProfile
from temporalio.plugin import SimplePlugin
from temporalio.service import ConnectConfig, ServiceClient
from temporalio.worker import Worker

from runtime.files import Reloaded, want_usable
from runtime.health import Readiness

_log = logging.getLogger(__name__)
_LOOK_INTERVAL: Final = timedelta(seconds=5)
"""Interval at which the files are checked, and at which a failed connection is tried again."""

CONNECT_TIMEOUT: Final = timedelta(seconds=10)
"""Maximum time that a new connection to Temporal may take."""


def tls_paths(profile: ClientConfigProfile) -> tuple[Path, ...]:
    """Return the files of the profile's TLS: TEMPORAL_TLS_SERVER_CA_CERT_PATH and the like."""
    tls = profile.tls
    sources = (tls.server_root_ca_cert, tls.client_cert, tls.client_private_key) if tls is not None else ()
    return tuple(source for source in sources if isinstance(source, Path))


def connect_problem(error: Exception) -> str:
    """Return in words why no connection was made, also for a TimeoutError, which has none."""
    return str(error) or f"no answer within {CONNECT_TIMEOUT.total_seconds():g} s"


class TlsReloading(SimplePlugin):
    """Replaces the connection of a client and of the client's workers.

    Each client needs one of its own, created before the files are read.
    """

    def __init__(self, profile: ClientConfigProfile, readiness: Readiness) -> None:
        """`readiness` names the files while they cannot be read."""
        super().__init__("llm.TlsReloading")
        self._tls = Reloaded(
            tls_paths(profile),
            lambda: profile.to_client_connect_config().get("tls"),
            "TLS files of Temporal",
            _log,
            OSError,
        )
        want_usable(readiness, "TEMPORAL_TLS_…", self._tls)
        self._workers: set[Worker] = set()
        self._replaced = False
        self._reloading: asyncio.Task[None] | None = None

    async def connect_service_client(
        self,
        config: ConnectConfig,
        next: Callable[[ConnectConfig], Awaitable[ServiceClient]],  # noqa: A002  the SDK's
    ) -> ServiceClient:
        """Connect; see Plugin."""
        service = _ReplaceableService(config, await next(config))
        # The task ends with the event loop, as the connection does.
        self._reloading = asyncio.create_task(self._keep_reloading(service))
        return service

    async def run_worker(self, worker: Worker, next: Callable[[Worker], Awaitable[None]]) -> None:  # noqa: A002
        """Run a worker; see Plugin."""
        self._workers.add(worker)
        if self._replaced:
            # Perhaps since the worker was created.
            worker.client = worker.client
        try:
            await next(worker)
        finally:
            self._workers.discard(worker)

    async def _keep_reloading(self, service: "_ReplaceableService") -> None:
        used, failed = self._tls.last, None
        while True:
            await asyncio.sleep(_LOOK_INTERVAL.total_seconds())
            tls = await asyncio.to_thread(self._tls.current)
            if tls is used:
                continue
            try:
                # The SDK waits for ever for a peer that takes connections and does not answer.
                async with asyncio.timeout(CONNECT_TIMEOUT.total_seconds()):
                    await service.reconnect(dataclasses.replace(service.config, tls=tls, lazy=False))
            except Exception as error:  # noqa: BLE001  # whatever it is, the next look tries again
                # The SDK reports a failed connection, and a file that is no certificate, as a plain RuntimeError.
                if tls is not failed:
                    problem = connect_problem(error)
                    _log.error("changed TLS files do not connect to Temporal, the old connection stays: %s", problem)
                failed = tls
            else:
                used = tls
                self._replaced = True
                for worker in self._workers:
                    # The setter takes the connection from the client's service.
                    worker.client = worker.client
                _log.info("connected to Temporal with changed TLS files")


class _ReplaceableService(ServiceClient):
    """Passes all calls on to a service client of the SDK, which can be replaced."""

    def __init__(self, config: ConnectConfig, connected: ServiceClient) -> None:
        super().__init__(config)
        self._connected = connected

    async def reconnect(self, config: ConnectConfig) -> None:
        """Use a new connection for all further calls. Raises RuntimeError or RPCError when it cannot be made."""
        self._connected = await ServiceClient.connect(config)

    @property
    def worker_service_client(self) -> Any:
        """See ServiceClient."""
        return self._connected.worker_service_client

    def update_rpc_metadata(self, metadata: Mapping[str, str | bytes]) -> None:
        """See ServiceClient."""
        self._connected.update_rpc_metadata(metadata)

    def update_api_key(self, api_key: str | None) -> None:
        """See ServiceClient."""
        self._connected.update_api_key(api_key)

    async def _rpc_call(self, *args: Any, **kwargs: Any) -> Any:
        return await self._connected._rpc_call(*args, **kwargs)
