"""A span and a measured duration for every call that a gRPC server takes, by OpenTelemetry's conventions for RPCs.

The suite does not use opentelemetry-instrumentation-grpc, because that leaves failed, cancelled and timed-out calls of
grpc.aio UNSET and does not measure them. gRPC itself answers calls of methods that the server does not have. They do
not reach this interceptor, so no client can invent the name of a method.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

from runtime.grpc_interceptor import OWN_SERVICES, Handler, Interceptor, behavior_of, with_behavior
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
"""Codes that the conventions define as errors of a server. The other codes are answers."""
_NEARLY: Final = timedelta(milliseconds=50)
"""Remaining time below which a cancel counts as the deadline: the client's cancel can arrive just before it passes."""


class RpcTelemetryInterceptor(Interceptor):
    """Creates a span for each call, a child of the span in the caller's metadata, and records its duration.

    The duration of a stream reaches to its end. Calls of health and reflection have no span, and only refused ones are
    recorded: probes call every second and would drown the others.

    Belongs before all interceptors that refuse calls, and before runtime.grpc_requests, whose handlers write the
    messages of their streams themselves.
    """

    def __init__(self, tracer: Tracer, meter: Meter) -> None:
        self._tracer = tracer
        self._duration = meter.create_histogram(
            RPC_SERVER_CALL_DURATION,
            unit="s",
            description="Duration of calls, from their headers to their end.",
            explicit_bucket_boundaries_advisory=SHORT_SECONDS,
        )

    def wrap(self, handler: Handler, call: grpc.HandlerCallDetails) -> Handler:
        """Wrap the handler of a call, a coroutine function."""
        method, handle = call.method, behavior_of(handler)
        parent = context_of({key: value for key, value in call.invocation_metadata or () if isinstance(value, str)})

        async def observed(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._observed(method, parent, context):
                return await handle(requests, context)

        async def own(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began = time.perf_counter()
            try:
                return await handle(requests, context)
            finally:
                refused: Any = context.code()
                if refused is not None:
                    self._record(method, refused, began)

        return with_behavior(handler, own if method.startswith(OWN_SERVICES) else observed)

    @contextmanager
    def _observed(self, method: str, parent: Context, context: grpc.aio.ServicerContext[Any, Any]) -> Iterator[None]:
        # Samplers read the attributes that a span starts with.
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
                # The code that the handler set or aborted with. It is None, despite its type, when there is none.
                chosen: Any = context.code()
                code = chosen or otherwise
                if code in _SERVERS_FAULT:
                    span.set_status(Status(StatusCode.ERROR, broken or context.details()))
                span.set_attributes(self._record(method, code, began))

    def _record(self, method: str, code: grpc.StatusCode, began: float) -> dict[str, str]:
        """Record the duration of a call; return its attributes."""
        attributes = {
            RPC_SYSTEM_NAME: RpcSystemNameValues.GRPC.value,
            RPC_METHOD: method[1:],
            RPC_RESPONSE_STATUS_CODE: code.name,
        }
        if code in _SERVERS_FAULT:
            attributes[ERROR_TYPE] = code.name
        self._duration.record(time.perf_counter() - began, attributes)
        return attributes
