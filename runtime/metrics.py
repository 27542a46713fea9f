"""Serves the metrics of a process to Prometheus, on one port with its health. OpenTelemetry's instruments record them.

The registry of prometheus_client is served as well: it has the memory and CPU time of the process, and all metrics of
vLLM. runtime.temporal_metrics adds those of Temporal's SDK.

With `OTEL_SDK_DISABLED` only that registry is served.
"""

import asyncio
import logging
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from prometheus_client import make_wsgi_app

from runtime.addresses import bracketed, unbracketed
from runtime.auth_keys import ApiKeys
from runtime.health import Readiness, with_health
from runtime.http_auth import with_api_keys
from runtime.metrics_settings import MetricsSettings
from runtime.scopes import READ_METRICS, SCOPES
from runtime.tls import server_context

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

_log = logging.getLogger(__name__)

SHORT_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Boundaries of histograms of what a person waits for, from the semantic conventions for RPC."""
LONG_SECONDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    *(60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0),
)
"""Boundaries of histograms of what takes from milliseconds up to the whole life of a job."""

_MAX_CONNECTIONS: Final = 64
"""Maximum number of concurrent connections, each of which has a thread."""
_CLOSING_SECONDS: Final = 1
"""Maximum wait for the thread of a connection that is closed for a newer one."""
_HANDSHAKE_SECONDS: Final = 10
"""Maximum duration of a TLS handshake."""


@dataclass(frozen=True)
class Metrics:
    """The instruments of a process."""

    provider: MeterProvider
    """Creates meters whose instruments are served."""

    def meter(self, name: str) -> Meter:
        """Return the meter of a package."""
        return self.provider.get_meter(name)


@asynccontextmanager
async def serving_metrics(settings: MetricsSettings, readiness: Readiness) -> AsyncIterator[Metrics]:
    """Serve metrics and health over HTTP while the context is open, with TLS over HTTPS. Port 0 takes a free one.

    Threads serve them, so that metrics can be read while the event loop is busy. Raises RuntimeError, with the names of
    its settings, if the address is taken; OSError when the files of TLS cannot be used, and KeyFileError for that of
    the API keys.
    """
    host, port, tls = settings.metrics_host, settings.metrics_port, settings.metrics_tls
    prefix = settings.model_config.get("env_prefix", "")
    context = server_context(tls, readiness) if tls is not None else None
    metrics_app = make_wsgi_app()
    if settings.metrics_api_keys_file is not None:
        keys = ApiKeys(settings.metrics_api_keys_file, SCOPES)
        keys.want_usable(readiness, "metrics api keys")
        metrics_app = with_api_keys(metrics_app, keys, READ_METRICS)
    try:
        server = _Server(host, port, with_health(metrics_app, readiness), context)
    except OSError as error:
        raise RuntimeError(
            f"cannot serve metrics on {bracketed(host)}:{port}: is it taken? ({error});"
            f" {prefix}METRICS_HOST and {prefix}METRICS_PORT choose another address"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics and health", daemon=True)
    thread.start()
    scheme = "http" if context is None else "https"
    _log.info("metrics on %s://%s:%d/metrics", scheme, bracketed(host), server.server_port)
    reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False)
    # Prometheus's text format has no place for exemplars.
    provider = MeterProvider([reader], exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False)
    try:
        yield Metrics(provider)
    finally:
        provider.shutdown()
        # shutdown() waits until the thread notices it, for at most half a second.
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    """A server with a thread for each connection. The server of prometheus_client serves metrics at every path."""

    daemon_threads = True

    def __init__(self, host: str, port: int, application: "WSGIApplication", context: ssl.SSLContext | None) -> None:
        self._context = context
        found = socket.getaddrinfo(unbracketed(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        super().__init__((str(address[0]), port), _SilentHandler)
        self.set_app(application)
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._open: dict[Any, socket.socket] = {}
        """A duplicate of each socket, the oldest first. A connection's thread may close the socket at any time."""
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread. Beyond the maximum the oldest one is closed for it.

        So clients that send nothing keep no probe out.
        """
        if not self._places.acquire(blocking=False):
            self._close_oldest()
            if not self._places.acquire(timeout=_CLOSING_SECONDS):
                super().shutdown_request(request)
                return
        with self._lock:
            self._open[request] = request.dup()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that has been served."""
        with self._lock:
            duplicate = self._open.pop(request, None)
        if duplicate is not None:
            duplicate.close()
        super().shutdown_request(request)
        self._places.release()

    def _close_oldest(self) -> None:
        with self._lock:
            duplicate = self._open.pop(next(iter(self._open), None), None)
        if duplicate is not None:
            # The client may have left.
            with duplicate, suppress(OSError):
                duplicate.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error of a connection, except where its client has gone or has timed out."""
        if not isinstance(sys.exception(), OSError):
            _log.exception("a request for metrics or health failed")

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection. Its TLS handshake takes place in its own thread, so it delays no other client."""
        if self._context is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_HANDSHAKE_SECONDS)
        try:
            secure = self._context.wrap_socket(request, server_side=True)
        except OSError as error:
            _log.debug("no TLS with %s: %s", client_address, error)
            return
        with secure:
            secure.settimeout(None)
            super().finish_request(secure, client_address)


class _SilentHandler(WSGIRequestHandler):
    timeout = 10
    """Maximum wait for a client to send or to read, in seconds."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""
