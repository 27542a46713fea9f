"""Requests of the services that every server has, health and reflection, parsed so that no bytes are its own fault.

gRPC's own deserializer answers UNKNOWN to bytes that do not parse, logs a traceback and takes any size.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError

from runtime.grpc_requests import Details

MAX_REQUEST_BYTES: Final = 64 * 1024
"""Maximum size of a request that holds names and filters, nothing to work on."""
_OWN_SERVICES: Final = "/grpc."

_Read = Callable[[bytes], Any]
_Context = grpc.aio.ServicerContext[Any, Any]


class OwnServices(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to a request of health or reflection that cannot be parsed or is too large."""

    def __init__(self, details: Details) -> None:
        self._details = details

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handlers of these services: Check answers, Watch writes its answers, reflection yields them."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OWN_SERVICES):
            return handler
        read: Any = handler.request_deserializer
        write = handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._of_one(handler.unary_unary, read), None, write)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._of_one(handler.unary_stream, read), None, write)
        return grpc.stream_stream_rpc_method_handler(self._of_many(handler.stream_stream, read), None, write)

    def _of_one(self, handle: Any, read: _Read) -> Any:
        async def call(data: bytes, context: _Context) -> Any:
            try:
                request = _parse(data, read)
            except _Unreadable as error:
                await self._refuse(context, error)
            return await handle(request, context)

        return call

    def _of_many(self, handle: Any, read: _Read) -> Any:
        async def parsed(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
            async for data in requests:
                yield _parse(data, read)

        async def call(requests: AsyncIterator[bytes], context: _Context) -> None:
            try:
                async with aclosing(handle(parsed(requests), context)) as responses:
                    async for response in responses:
                        await context.write(response)
            except _Unreadable as error:
                await self._refuse(context, error)

        return call

    async def _refuse(self, context: _Context, error: _Unreadable) -> NoReturn:
        code, message = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        await context.abort(code, message, tuple(self._details(code, message)))


class _Unreadable(Exception):
    """The request is none of the method's; the message is for the client."""


def _parse(data: bytes, read: _Read) -> Any:
    if len(data) > MAX_REQUEST_BYTES:
        raise _Unreadable(f"the request is {len(data)} bytes; at most {MAX_REQUEST_BYTES} fit")
    try:
        return read(data)
    except DecodeError:
        raise _Unreadable("the request cannot be parsed: truncated, or made from another proto file") from None
