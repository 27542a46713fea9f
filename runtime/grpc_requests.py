"""The one request of a call that has one: waited for with a deadline, and missed with an answer.

grpc.aio waits for a request without end, and leaves a call open for ever whose client has ended it without one: calls
that cost their client a few bytes each would take all that a server may have. So the methods are registered as if they
streamed requests, of which the first is taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class OneRequest(grpc.aio.ServerInterceptor):
    """Ends calls without a request: DEADLINE_EXCEEDED when it is late, INVALID_ARGUMENT when none comes.

    Belongs before all interceptors that look at requests.
    """

    def __init__(self, timeout: timedelta) -> None:
        """`timeout`: the longest wait for a request, from the call's headers to its last byte."""
        self._timeout = timeout

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call whose request does not stream."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        handle: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def unary(requests: AsyncIterator[Any], context: _Context) -> Any:
            return await handle(await self._first(requests, context), context)

        async def stream(requests: AsyncIterator[Any], context: _Context) -> None:
            # Not a generator, and nothing in between: see runtime.grpc_calls.
            request = await self._first(requests, context)
            answering = handle(request, context)
            if not hasattr(answering, "__aiter__"):
                await answering
                return
            async with aclosing(answering) as responses:
                async for response in responses:
                    await context.write(response)

        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, *serializers)
        return grpc.stream_unary_rpc_method_handler(unary, *serializers)

    async def _first(self, requests: AsyncIterator[Any], context: _Context) -> Any:
        coming = asyncio.ensure_future(anext(requests, None))
        # Not cancelled when it is late: gRPC goes on with what it has begun until the call ends.
        await asyncio.wait([coming], timeout=self._timeout.total_seconds())
        if not coming.done():
            coming.add_done_callback(_ignore)
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no request has come within {self._timeout}")
        if (request := coming.result()) is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has ended without a request; send one")
        return request


def _ignore(coming: asyncio.Future[Any]) -> None:
    if not coming.cancelled():
        coming.exception()
