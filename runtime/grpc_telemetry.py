"""A span and a measured duration for every call that a gRPC server takes, by OpenTelemetry's conventions for RPCs.

Ours because opentelemetry-instrumentation-grpc leaves failed, cancelled and timed-out calls of grpc.aio UNSET, and
measures nothing of them. Calls of methods that the server does not have are answered by gRPC itself and not seen here,
so that no client can make up the name of a method.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from datetime import timedelta
from typing import Any, Final

import grpc
from opentelemetry.context import Context
from opentelemetry.metrics import Meter
from opentelemetry.semconv._incubating.attributes.rpc_attributes import (
    RPC_METHOD,
    RPC_RESPONSE_STATUS_CODE,
    RPC_SYSTEM_NAME,
    RpcSystemNameValues,
)
from opentelemetry.semconv._incubating.metrics.rpc_metrics import RPC_SERVER_CALL_DURATION
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from runtime.metrics import SHORT_SECONDS
from runtime.telemetry import context_of

_SERVERS_FAULT: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""What the conventions have a server call an error; the other codes are answers."""
_OWN_SERVICES: Final = "/grpc."
"""Health and reflection, asked every second by machines: they would drown the others."""
_NEARLY: Final = timedelta(milliseconds=50)
"""A client whose deadline passes cancels the call, which can arrive just before the deadline does here."""


class Calls(grpc.aio.ServerInterceptor):
    """Makes the spans, children of what the caller's metadata names, and measures. A stream lasts to its end.

    Belongs before interceptors that turn exceptions into statuses, whose statuses it reports. Calls that stream
    requests pass through: the suite has none.
    """

    def __init__(self, tracer: Tracer, meter: Meter) -> None:
        self._tracer = tracer
        self._duration = meter.create_histogram(
            RPC_SERVER_CALL_DURATION,
            unit="s",
            description="How long calls took, streams to their end.",
            explicit_bucket_boundaries_advisory=SHORT_SECONDS,
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.request_streaming or method.startswith(_OWN_SERVICES):
            return handler
        metadata = handler_call_details.invocation_metadata or ()
        parent = context_of({key: value for key, value in metadata if isinstance(value, str)})

        handle: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._observed(method, parent, context):
                return await handle(request, context)

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            # Not a generator: a cancel would not reach one that waits for its message to be sent.
            handling = handle(request, context)
            # A stream lasts, and its handler alone knows how long it needs the request.
            del request
            with self._observed(method, parent, context):
                async with aclosing(handling) as responses:
                    async for response in responses:
                        await _write(context, response)

        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, *serializers)
        return grpc.unary_unary_rpc_method_handler(unary, *serializers)

    @contextmanager
    def _observed(self, method: str, parent: Context, context: grpc.aio.ServicerContext[Any, Any]) -> Iterator[None]:
        attributes = {RPC_SYSTEM_NAME: RpcSystemNameValues.GRPC.value, RPC_METHOD: method[1:]}
        otherwise, broken, began = grpc.StatusCode.OK, "", time.perf_counter()
        with self._tracer.start_as_current_span(
            method[1:], parent, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except asyncio.CancelledError:
                left = context.time_remaining()
                late = left is not None and left < _NEARLY.total_seconds()
                otherwise = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
                raise
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                otherwise, broken = grpc.StatusCode.UNKNOWN, type(error).__name__
                raise
            finally:
                # What a handler has set or aborted with, whatever it raised; None, whatever its type says, without.
                chosen: Any = context.code()
                code = chosen or otherwise
                attributes[RPC_RESPONSE_STATUS_CODE] = code.name
                if code in _SERVERS_FAULT:
                    attributes[ERROR_TYPE] = code.name
                    span.set_status(Status(StatusCode.ERROR, broken or context.details()))
                span.set_attributes(attributes)
                self._duration.record(time.perf_counter() - began, attributes)


async def _write(context: grpc.aio.ServicerContext[Any, Any], response: Any) -> None:
    """Send a message; raises CancelledError when the client has left, also where gRPC says so only by failing."""
    try:
        await context.write(response)
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error
