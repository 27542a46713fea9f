"""Collectors of spans in the process of the test: OTLP over gRPC and over HTTP."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from aiohttp import web
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator


@dataclass(frozen=True)
class Caller:
    """Trace context of a client that propagates its span to the server."""

    trace_id: str = field(default_factory=lambda: f"{RandomIdGenerator().generate_trace_id():032x}")
    span_id: str = field(default_factory=lambda: f"{RandomIdGenerator().generate_span_id():016x}")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("traceparent", f"00-{self.trace_id}-{self.span_id}-01"),)


class Span:
    """A received span."""

    def __init__(self, raw: trace_pb2.Span, service: str) -> None:
        self.raw = raw
        self.service = service
        self.name = raw.name
        self.trace_id = raw.trace_id.hex()
        self.id = raw.span_id.hex()
        self.parent_id = raw.parent_span_id.hex()
        self.attributes = {item.key: _value(item.value) for item in raw.attributes}
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in raw.links]
        self.failed = raw.status.code == trace_pb2.Status.STATUS_CODE_ERROR
        self.seconds = (raw.end_time_unix_nano - raw.start_time_unix_nano) / 1e9


class Spans:
    """All spans that a collector received."""

    def __init__(self) -> None:
        self.all: list[Span] = []

    def take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        """Store the spans of an export request."""
        for resource in request.resource_spans:
            names = {item.key: _value(item.value) for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.all += [Span(span, names["service.name"]) for span in scope.spans]

    def of(self, trace_id: str) -> list[Span]:
        """Return a trace's spans in the order of their start.

        On a busy machine the answer of a workflow task can be lost. Its spans are then exported again with the same
        ids, and each counts once, as in any store of spans.
        """
        spans = {span.id: span for span in self.all if span.trace_id == trace_id}
        return sorted(spans.values(), key=lambda span: span.raw.start_time_unix_nano)

    def named(self, trace_id: str, name: str) -> list[Span]:
        return [span for span in self.of(trace_id) if span.name == name]

    def tree(self, caller: Caller, words: Callable[[Span], str]) -> list[str]:
        """Return the caller's trace as one line for each span, indented below its parent, siblings in order of start.

        The line of a span whose parent was never received is not indented, and marked as LOST.
        """
        spans = self.of(caller.trace_id)
        known = {span.id for span in spans} | {caller.span_id}

        def below(parent_id: str, depth: int) -> Iterator[str]:
            for span in spans:
                if span.parent_id == parent_id:
                    yield "  " * depth + span.name + words(span)
                    yield from below(span.id, depth + 1)

        lost = [f"LOST {span.name}" for span in spans if span.parent_id not in known]
        return [*below(caller.span_id, 0), *lost]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Collector that listens for OTLP over gRPC on a free port while its context is open."""

    def __init__(self) -> None:
        self.spans = Spans()
        self.address = ""
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process exports its spans to this collector."""
        return {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.address}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  the name of the RPC
        self.spans.take(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    async def __aenter__(self) -> Self:
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)


class HttpCollector:
    """Collector that listens for OTLP over HTTP, which OpenTelemetry calls `http/protobuf`."""

    def __init__(self) -> None:
        self.spans = Spans()
        self.address = ""
        app = web.Application()
        app.router.add_post("/v1/traces", self._export)
        self._runner = web.AppRunner(app)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process exports its spans to this collector."""
        return {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.address}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    async def _export(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        self.spans.take(trace_service_pb2.ExportTraceServiceRequest.FromString(await request.read()))
        answer = trace_service_pb2.ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=answer, content_type=request.content_type)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
