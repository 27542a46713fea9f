"""A stub whose streams are opened again when they break."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from typing import Any, Final

import grpc

from durable_llm._retrying_stub import RESET, RetryingStub, Silence
from durable_llm._statuses import from_call
from durable_llm.errors import ApiError, Unavailable

_QUIET: Final = timedelta(minutes=5)
"""Time without a message after which a stream is opened again. What is watched may be quiet for long while it waits."""


class StreamingStub(RetryingStub):
    """A stub of a service whose calls are all safe to repeat."""

    async def messages(
        self, method: str, request: Callable[[], Any], *, until_end: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Yield the messages of a stream, opened again when it breaks. It ends with OK, if not `until_end`."""
        silence = Silence()
        while True:
            call = getattr(self._stub, method)(request(), metadata=self._metadata)
            messages = aiter(call)
            try:
                while True:
                    try:
                        with silence.growing():
                            async with asyncio.timeout(_QUIET.total_seconds()):
                                message = await anext(messages, None)
                    except TimeoutError:
                        # Nothing was lost: it is opened again, which shows whether the service is there.
                        silence = Silence()
                        break
                    except grpc.aio.AioRpcError as error:
                        raise _failure(error) from error
                    self._answered = True
                    if message is None and not until_end:
                        return
                    if message is None:
                        raise Unavailable("the stream ended before what it follows did", grpc.StatusCode.UNAVAILABLE)
                    silence = Silence()
                    yield message
            except ApiError as error:
                await self.back_off(error, silence, f"opening {method} again")
            finally:
                call.cancel()


def _failure(error: grpc.aio.AioRpcError) -> ApiError:
    failure = from_call(error)
    # A proxy resets the stream when its gateway dies. The gateway's own errors have a reason.
    if failure.code in RESET and not failure.reason:
        return Unavailable(str(failure), grpc.StatusCode.UNAVAILABLE)
    return failure
