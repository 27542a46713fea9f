"""What the server interceptors of the suite share: access to a call's handler, and refusals with details."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Details = Callable[[grpc.StatusCode, str], Sequence[tuple[str, bytes]]]
"""Returns the trailing metadata of a refusal with this code and message: the google.rpc details of service errors."""

OWN_SERVICES: Final = "/grpc."
"""Prefix of the methods of the services that every server has: health and reflection."""


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of the methods that the server has."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the wrapped handler of a call; None for a method that the server does not have."""
        handler = await continuation(handler_call_details)
        return None if handler is None else self.wrap(handler, handler_call_details)

    @abstractmethod
    def wrap(self, handler: Handler, call: grpc.HandlerCallDetails) -> Handler:
        """Return the handler that replaces `handler` for the call, or `handler` itself."""


def behavior_of(handler: Handler) -> Any:
    """Return the function of a handler of any of the four kinds."""
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def with_behavior(
    handler: Handler,
    behavior: Any,
    *,
    request_streaming: bool | None = None,
    parses: bool = True,
    serializes: bool = True,
) -> Handler:
    """Return a handler of the same kind with another function.

    `request_streaming` changes the kind. Without `parses` the function takes requests as bytes. Without `serializes` it
    returns responses as bytes.
    """
    streaming = handler.request_streaming if request_streaming is None else request_streaming
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[bool(streaming), bool(handler.response_streaming)]
    made: Handler = make(
        behavior,
        handler.request_deserializer if parses else None,
        handler.response_serializer if serializes else None,
    )
    return made


async def refuse(
    context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, message: str, details: Details
) -> NoReturn:
    """End a call with a status and its details."""
    await context.abort(code, message, tuple(details(code, message)))
