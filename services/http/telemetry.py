"""A span and a measured duration for every request, by OpenTelemetry's conventions for HTTP."""

import time
from typing import Any, Final

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_REQUEST_METHOD, HTTP_RESPONSE_STATUS_CODE, HTTP_ROUTE
from opentelemetry.semconv.attributes.url_attributes import URL_SCHEME
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.telemetry import context_of
from services.http.metrics import HttpMetrics
from services.http.resources import ROUTE

_METHODS: Final = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")


class Telemetry:
    """Observes requests. A span is a child of the span in the request's `traceparent`."""

    def __init__(self, app: ASGIApp, tracer: Tracer, metrics: HttpMetrics) -> None:
        self._app = app
        self._tracer = tracer
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and observe it to its end."""
        # A method or path that the caller has invented must not become a label.
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        labels: dict[str, Any] = {HTTP_REQUEST_METHOD: method, URL_SCHEME: scope["scheme"]}
        # None: the client has gone before there was an answer.
        status: int | None = None

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began, parent = time.perf_counter(), context_of(Headers(scope=scope))
        with self._tracer.start_as_current_span(method, parent, SpanKind.SERVER, dict(labels)) as span:
            try:
                await self._app(scope, receive, observed)
            except Exception:
                status = status or 500
                raise
            finally:
                if (route := scope.get(ROUTE)) is not None:
                    labels[HTTP_ROUTE] = route
                    span.update_name(f"{method} {route}")
                if status is not None:
                    labels[HTTP_RESPONSE_STATUS_CODE] = status
                if status is not None and status >= 500:
                    labels[ERROR_TYPE] = str(status)
                    span.set_status(Status(StatusCode.ERROR))
                span.set_attributes(labels)
                self._metrics.duration.record(time.perf_counter() - began, labels)
