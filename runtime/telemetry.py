"""Sets up OpenTelemetry's traces of this process, and converts their context to and from its W3C form.

OpenTelemetry's own environment variables (`OTEL_…`) choose where spans go, which are kept and how they are sent. Only
its SDK reads them. Without `OTEL_TRACES_EXPORTER` nothing is exported. Spans are created nevertheless, so that logs,
statuses and the next process name the same trace. With `OTEL_SDK_DISABLED=true` none are created.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.context import Context

# The part of the SDK that reads OTEL_TRACES_EXPORTER. It has no public name. The public configurator sets a global
# provider that Temporal's plugin refuses.
from opentelemetry.sdk._configuration import _get_exporter_names, _import_exporters
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.semconv.attributes.service_attributes import SERVICE_INSTANCE_ID, SERVICE_NAME
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from runtime.span_redaction import RedactingExporter

if TYPE_CHECKING:
    from temporalio.contrib.opentelemetry import ReplaySafeTracerProvider

_FLUSH_TIMEOUT: Final = timedelta(seconds=5)
"""Maximum time to send the last spans when the process ends. An unavailable collector must not delay its end."""
_W3C: Final = TraceContextTextMapPropagator()

NewProvider = Callable[[Resource], "TracerProvider | ReplaySafeTracerProvider"]
"""Returns a provider of tracers that does not shut down by itself."""


def new_provider(resource: Resource) -> TracerProvider:
    """Return the provider of a process that runs no workflows: see runtime.temporal.new_provider."""
    return TracerProvider(resource=resource, shutdown_on_exit=False)


@contextmanager
def tracing(service: str, new_provider: NewProvider = new_provider, *, redact_errors: bool = False) -> Iterator[None]:
    """Create and export spans while the context is open, then send the last ones within a bounded time.

    `service` names the process unless OTEL_SERVICE_NAME does. A process that connects to Temporal passes
    runtime.temporal.new_provider. With `redact_errors` exported spans
    hold the types of errors without their messages. Enter it once in a process, before anything gets a tracer. Raises
    RuntimeError, with the name of the variable, for an unknown exporter or protocol.
    """
    provider = new_provider(_resource(service))
    for make_exporter in _exporters():
        exporter = make_exporter()
        exporter = RedactingExporter(exporter) if redact_errors else exporter
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        _shut_down(provider)


def current_headers() -> Mapping[str, str]:
    """Return the current span's W3C context as headers for the next call; empty without a span.

    The headers have no `tracestate`, which is not for third parties.
    """
    headers: dict[str, str] = {}
    _W3C.inject(headers)
    headers.pop("tracestate", None)
    return headers


def current_traceparent() -> str:
    """Return the current span's W3C `traceparent`; empty without a span."""
    return current_headers().get("traceparent", "")


def context_of(headers: Mapping[str, str]) -> Context:
    """Return the caller's W3C context; an empty one when there is none or it is invalid.

    It has no baggage and no tracestate: both would go into workflow histories and to every service called next.
    """
    return _W3C.extract({"traceparent": headers.get("traceparent", "")}, Context())


def link_to(traceparent: str, attributes: Attributes = None) -> None:
    """Link the current span to the span of `traceparent`, of this trace or another. An invalid one is ignored."""
    span = trace.get_current_span(context_of({"traceparent": traceparent})).get_span_context()
    if span.is_valid:
        trace.get_current_span().add_link(span, attributes)


def _exporters() -> Iterable[Callable[[], SpanExporter]]:
    """Return the factories of the exporters that the environment names. Raises RuntimeError."""
    try:
        names = _get_exporter_names("traces")
    except RuntimeError as error:
        raise RuntimeError(
            "OTEL_EXPORTER_OTLP_PROTOCOL, or OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, has to be grpc (the default) or"
            f" http/protobuf: {error}"
        ) from error
    try:
        exporters, _, _ = _import_exporters(names, [], [])
    except RuntimeError as error:
        raise RuntimeError(f"OTEL_TRACES_EXPORTER has to be otlp, console or none: {error}") from error
    return exporters.values()


def _resource(service: str) -> Resource:
    ours = {SERVICE_NAME: service, SERVICE_INSTANCE_ID: f"{socket.gethostname()}-{os.getpid()}"}
    # What is passed to create() would override what the operator set, so that is passed, too.
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})


def _shut_down(provider: "TracerProvider | ReplaySafeTracerProvider") -> None:
    # Neither the SDK's shutdown nor its flush keeps to a time limit.
    flushing = threading.Thread(target=provider.shutdown, name="flush of spans", daemon=True)
    flushing.start()
    flushing.join(_FLUSH_TIMEOUT.total_seconds())
