"""A call's span records how the call ended. Server, client and OpenTelemetry's SDK are the real ones."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import baggage
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from runtime.grpc_server import GrpcServer, Limits
from runtime.grpc_telemetry import RpcTelemetryInterceptor
from tests.support.otlp import Caller

SERVICE = "test.Service"
BIG = b"x" * 1_000_000
SOME = b"x" * 50_000


class Servicer:
    """Handlers that do what the request names."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.baggage: dict[str, object] = {}

    async def unary(self, request: bytes, context: Any) -> bytes:
        self.baggage = dict(baggage.get_all())
        if request == b"abort":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        if request == b"refuse":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not so")
        if request == b"break":
            raise KeyError("broken")
        if request == b"hang":
            self.reached.set()
            await asyncio.Event().wait()
        return request

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"1"
        if request == b"hang":
            await asyncio.Event().wait()
        while request in (b"flood", b"flow"):
            self.reached.set()
            yield BIG if request == b"flood" else SOME
        if request == b"abort":
            await context.abort(grpc.StatusCode.INTERNAL, "gone wrong")
        yield b"2"


class Exporter(InMemorySpanExporter):
    """An exporter that sets `ended` when a span is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.ended.set()
        return super().export(spans)


class Called:
    """A server, a channel to it, and the spans of its calls."""

    def __init__(self, channel: grpc.aio.Channel, servicer: Servicer, spans: Exporter) -> None:
        self.unary: Any = channel.unary_unary(f"/{SERVICE}/Unary")
        self.stream: Any = channel.unary_stream(f"/{SERVICE}/Stream")
        self.channel = channel
        self.reached = servicer.reached
        self._servicer = servicer
        self._spans = spans

    @property
    def baggage(self) -> dict[str, object]:
        """The baggage that the handler found."""
        return self._servicer.baggage

    async def span(self) -> ReadableSpan:
        """Wait until the only span has ended, and return it. The client may have its answer before."""
        await self._spans.ended.wait()
        (span,) = self._spans.get_finished_spans()
        return span

    def forget(self) -> None:
        """Reset everything for another call."""
        self._spans.clear()
        self._spans.ended.clear()
        self.reached.clear()

    async def ended(self) -> tuple[str, StatusCode, str | None, str | None]:
        """Return the span's gRPC code, status, description and error type."""
        span = await self.span()
        about = dict(span.attributes or {})
        found = (about.pop("rpc.response.status_code"), span.status.status_code, span.status.description)
        error = about.pop("error.type", None)
        assert about.pop("rpc.method").startswith(f"{SERVICE}/")
        assert about == {"rpc.system.name": "grpc"}
        return (*found, error)


@pytest.fixture
async def called() -> AsyncIterator[Called]:
    spans = Exporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    servicer = Servicer()
    calls = RpcTelemetryInterceptor(provider.get_tracer("test"), MeterProvider().get_meter("test"))
    server = GrpcServer([SERVICE], "127.0.0.1", 0, Limits(4 << 20), telemetry=calls)
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(servicer.unary),
        "Stream": grpc.unary_stream_rpc_method_handler(servicer.stream),
    }
    server.server.add_registered_method_handlers(SERVICE, handlers)
    port = server.server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Called(channel, servicer, spans)
    await server.server.stop(0)


async def fails(call: Any) -> grpc.StatusCode:
    """Return the status code that the client receives."""
    if isinstance(call, grpc.aio.UnaryStreamCall):
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
    code: grpc.StatusCode = await call.code()
    return code


async def test_a_call_that_succeeds(called: Called) -> None:
    assert await called.unary(b"x") == b"x"
    assert await called.ended() == ("OK", StatusCode.UNSET, None, None)


async def test_a_call_continues_the_callers_trace(called: Called) -> None:
    caller = Caller()
    await called.unary(b"x", metadata=(*caller.metadata, ("other-bin", b"\xff")))
    span = await called.span()
    assert span.name == f"{SERVICE}/Unary"
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (caller.trace_id, caller.span_id)


async def test_a_callers_nonsense_is_ignored(called: Called) -> None:
    """Baggage is ignored as well: it would be propagated into the workflow's history."""
    await called.unary(b"x", metadata=(("traceparent", "00-nonsense"), ("tracestate", "=;=,"), ("baggage", "a=b")))
    assert (await called.span()).parent is None
    assert called.baggage == {}


async def test_a_callers_tracestate_is_not_taken_over(called: Called) -> None:
    """It would be propagated into the workflow's history and to the job's notification targets."""
    caller = Caller()
    await called.unary(b"x", metadata=(*caller.metadata, ("tracestate", "vendor=own")))
    span = await called.span()
    assert f"{span.context.trace_id:032x}" == caller.trace_id
    assert not span.context.trace_state


async def test_a_call_that_the_server_could_not_do(called: Called) -> None:
    assert await fails(called.unary(b"abort")) == grpc.StatusCode.UNAVAILABLE
    assert await called.ended() == ("UNAVAILABLE", StatusCode.ERROR, "not now", "UNAVAILABLE")


async def test_a_call_that_was_wrong(called: Called) -> None:
    """The error is the client's, so the span's status stays unset, as the semantic conventions require."""
    assert await fails(called.unary(b"refuse")) == grpc.StatusCode.INVALID_ARGUMENT
    assert await called.ended() == ("INVALID_ARGUMENT", StatusCode.UNSET, None, None)


@pytest.mark.filterwarnings("ignore")
async def test_a_call_that_broke(called: Called) -> None:
    """An exception that no code turned into a status is an error with status UNKNOWN."""
    assert await fails(called.unary(b"break")) == grpc.StatusCode.UNKNOWN
    assert await called.ended() == ("UNKNOWN", StatusCode.ERROR, "KeyError", "UNKNOWN")


async def test_a_call_that_the_client_cancels(called: Called) -> None:
    call = called.unary(b"hang")
    await called.reached.wait()
    call.cancel()
    assert await called.ended() == ("CANCELLED", StatusCode.UNSET, None, None)


async def test_a_call_past_its_deadline(called: Called) -> None:
    assert await fails(called.unary(b"hang", timeout=0.2)) == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await called.ended() == ("DEADLINE_EXCEEDED", StatusCode.ERROR, "", "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_a_call_that_ends_without_a_request(called: Called, method: str) -> None:
    """The span of a call that is refused before it reaches the service has its status, too."""
    call = called.channel.stream_stream(f"/{SERVICE}/{method}")()
    await call.done_writing()
    assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert await called.ended() == ("INVALID_ARGUMENT", StatusCode.UNSET, None, None)


async def test_a_streams_span_lasts_as_long_as_the_stream(called: Called) -> None:
    messages = [message async for message in called.stream(b"x")]
    assert messages == [b"1", b"2"]
    assert await called.ended() == ("OK", StatusCode.UNSET, None, None)


async def test_a_stream_that_fails_on_its_way(called: Called) -> None:
    assert await fails(called.stream(b"abort")) == grpc.StatusCode.INTERNAL
    assert await called.ended() == ("INTERNAL", StatusCode.ERROR, "gone wrong", "INTERNAL")


async def test_a_stream_past_its_deadline(called: Called) -> None:
    assert await fails(called.stream(b"hang", timeout=0.2)) == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await called.ended() == ("DEADLINE_EXCEEDED", StatusCode.ERROR, "", "DEADLINE_EXCEEDED")
    span = await called.span()
    assert (span.end_time or 0) - (span.start_time or 0) > 0.1e9


async def test_a_stream_whose_client_leaves_while_it_waits(called: Called) -> None:
    call = called.stream(b"hang")
    assert await call.read() == b"1"
    call.cancel()
    assert await called.ended() == ("CANCELLED", StatusCode.UNSET, None, None)


async def test_a_stream_whose_client_leaves_without_reading(called: Called) -> None:
    """The handler then waits for flow control to take its message."""
    call = called.stream(b"flood")
    await called.reached.wait()
    call.cancel()
    assert await called.ended() == ("CANCELLED", StatusCode.UNSET, None, None)


async def test_a_stream_whose_client_leaves_while_it_is_written_to(called: Called) -> None:
    """gRPC then sometimes fails a write instead of cancelling the handler, more often on a busy machine."""
    for _ in range(200):
        called.forget()
        call = called.stream(b"flow")
        await called.reached.wait()
        await call.read()
        call.cancel()
        assert await called.ended() == ("CANCELLED", StatusCode.UNSET, None, None)


async def test_health_checks_are_not_traced(called: Called) -> None:
    await health_pb2_grpc.HealthStub(called.channel).Check(health_pb2.HealthCheckRequest())
    await called.unary(b"x")
    assert (await called.span()).name == f"{SERVICE}/Unary"
