"""The server of the front: listens with TLS or without, and ends gracefully."""

import asyncio
import logging
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from socket import SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, getaddrinfo, socket
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from runtime.addresses import bracketed, unbracketed
from runtime.background import beside
from runtime.health import Readiness
from runtime.tls import server_context
from services.http.connection import connections
from services.http.front import Front
from services.http.settings import HttpSettings

_log = logging.getLogger(__name__)
_MAX_HEAD_BYTES: Final = 32 * 1024
"""Maximum size of the head of a request."""


@asynccontextmanager
async def serving(app: ASGIApp, front: Front, readiness: Readiness) -> AsyncIterator[str]:
    """Serve the application while the context is open, and yield the address.

    At the end of the context streams end, and requests have their grace.

    Raises RuntimeError if the address is taken, OSError when the files of the TLS cannot be used.
    """
    settings = front.settings
    context = server_context(settings.tls, readiness) if settings.tls is not None else None
    config = uvicorn.Config(
        app,
        http=connections(settings),
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=settings.keep_alive.total_seconds(),  # type: ignore[arg-type]  # any number of seconds
        timeout_graceful_shutdown=settings.shutdown_grace.total_seconds(),  # type: ignore[arg-type]
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        ssl_context_factory=(lambda *_: context) if context is not None else None,
    )
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    server = _Server(config)
    running = asyncio.create_task(server.serve([listener]))
    address = f"{bracketed(host)}:{port}"
    _log.info("listening on %s://%s", "http" if settings.tls is None else "https", address)
    try:
        async with beside(*(work() for work in front.background)):
            yield address
    finally:
        front.draining.set()
        server.should_exit = True
        await running


class _Server(uvicorn.Server):
    """A server in a process that has handlers of signals already (runtime.process)."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none."""
        yield


def _listen(settings: HttpSettings) -> socket:
    """Return a socket that listens. Raises RuntimeError."""
    host, port = unbracketed(settings.host), settings.port
    try:
        family, kind, number, _, address = getaddrinfo(host, port, type=SOCK_STREAM)[0]
        listener = socket(family, kind, number)
        listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise RuntimeError(
            f"cannot listen on {bracketed(host)}:{port}: is it taken? ({error}); HTTP_HOST and HTTP_PORT choose another"
        ) from error
    listener.setblocking(False)
    return listener
