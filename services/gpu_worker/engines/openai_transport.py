"""The HTTP client of the engines that call a provider. It bounds what a provider may have them hold in memory."""

from collections.abc import AsyncIterator
from typing import Final

import httpx2
import openai

from jobs.errors import EngineFailed

MAX_MESSAGE_BYTES: Final = 8 << 20
"""Maximum size of one message of a stream, and of any other answer."""
_BLANK_LINES: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


def bounded_client(max_bytes: int = MAX_MESSAGE_BYTES) -> httpx2.AsyncClient:
    """Return a client that fails with EngineFailed at an answer, or a message of a stream, of more bytes."""

    async def bound(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise EngineFailed("the provider's answer is compressed, which nobody has asked for")
        # The client reads a refusal as a whole, whatever its type.
        messages = response.is_success and response.headers.get("content-type", "").startswith("text/event-stream")
        assert isinstance(response.stream, httpx2.AsyncByteStream)  # noqa: S101  that of an asynchronous client is
        response.stream = _BoundedStream(response.stream, max_bytes, messages=messages)

    # Nothing bounds what a compressed answer becomes. A hook keeps the connections and the proxies of the SDK's client,
    # which a transport of our own would not have.
    return openai.DefaultAsyncHttpxClient(headers={"accept-encoding": "identity"}, event_hooks={"response": [bound]})


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, max_bytes: int, *, messages: bool) -> None:
        self._inner = inner
        self._max_bytes = max_bytes
        self._messages = messages

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size, last = 0, b""
        async for part in self._inner:
            size += len(part)
            if self._messages:
                # A blank line may be cut in two.
                window = last + part
                if ends := [window.rfind(blank) + len(blank) for blank in _BLANK_LINES if blank in window]:
                    size = len(window) - max(ends)
                last = window[-3:]
            if size > self._max_bytes:
                raise EngineFailed(f"the provider's answer is too large: more than {self._max_bytes} bytes")
            yield part

    async def aclose(self) -> None:
        await self._inner.aclose()
