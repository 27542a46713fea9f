"""What all requests share."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from runtime.health import Readiness
from services.http.failures import unavailable
from services.http.gateway import Gateway
from services.http.metrics import HttpMetrics
from services.http.settings import HttpSettings


@dataclass
class Front:
    """The parts of the front that its packages use."""

    settings: HttpSettings
    gateway: Gateway
    metrics: HttpMetrics
    readiness: Readiness | None = None
    """Names the files of the console while they cannot be used."""
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the process shuts down. Streams end then."""
    streams: int = 0
    """Number of open streams."""
    background: list[Callable[[], Coroutine[None, None, None]]] = field(default_factory=list)
    """Tasks that run as long as the front serves. The packages add to it."""

    def require_place(self) -> None:
        """Raise Failure, 503, when no further stream may open."""
        if self.draining.is_set():
            raise unavailable("the front is shutting down; call again", "FRONT_SHUTDOWN")
        if self.streams >= self.settings.max_streams:
            raise unavailable("too many streams are open here; call again", "LIMIT_REACHED")

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Hold the place of an open stream. Raises Failure, 503, when there is none."""
        self.require_place()
        self.streams += 1
        self.metrics.streams.add(1)
        try:
            yield
        finally:
            self.streams -= 1
            self.metrics.streams.add(-1)
