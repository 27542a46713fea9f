"""Parses requests of health and reflection, so that no bytes from a client look like a fault of the server.

gRPC's own deserializer answers UNKNOWN to bytes that do not parse, logs a traceback and accepts any size.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError

from runtime.grpc_interceptor import OWN_SERVICES, Details, Handler, Interceptor, behavior_of, refuse, with_behavior

MAX_REQUEST_BYTES: Final = 64 * 1024
"""Maximum size of a request that holds only names and filters."""

_Read = Callable[[bytes], Any]
_Context = grpc.aio.ServicerContext[Any, Any]


class OwnServices(Interceptor):
    """Answers INVALID_ARGUMENT to a request of health or reflection that cannot be parsed or is too large."""

    def __init__(self, details: Details) -> None:
        self._details = details

    def wrap(self, handler: Handler, call: grpc.HandlerCallDetails) -> Handler:
        """Wrap the handlers of these services: Check returns its answer, Watch writes them, reflection yields them."""
        if not call.method.startswith(OWN_SERVICES):
            return handler
        parsed = self._of_many if handler.request_streaming else self._of_one
        read: Any = handler.request_deserializer
        return with_behavior(handler, parsed(behavior_of(handler), read), parses=False)

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
        await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error), self._details)


class _Unreadable(Exception):
    """The request is too large or cannot be parsed. The message is for the client."""


def _parse(data: bytes, read: _Read) -> Any:
    if len(data) > MAX_REQUEST_BYTES:
        raise _Unreadable(f"the request is {len(data)} bytes; at most {MAX_REQUEST_BYTES} fit")
    try:
        return read(data)
    except DecodeError:
        raise _Unreadable("the request cannot be parsed: truncated, or made from another proto file") from None
