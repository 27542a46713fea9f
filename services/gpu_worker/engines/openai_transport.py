"""The client of the engines that call a provider. It bounds what a provider may have them hold in memory."""

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import httpx2
import openai
from pydantic import HttpUrl

from jobs.errors import EngineDead, EngineFailed

log = logging.getLogger(__name__)

_CONNECT_SECONDS: Final = 10
_KEY: Final = re.compile(r"[\x21-\x7e]+")
MAX_MESSAGE_BYTES: Final = 8 << 20
"""Maximum size of one message of a stream, and of any other answer."""
PIECES_OF_A_TOKEN: Final = 8
"""Maximum number of pieces that a provider may make of a token. One that sends more ignores max_tokens."""
_BLANK_LINES: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


def provider_client(
    base_url: HttpUrl, api_key_file: Path | None, silence: float, max_bytes: int = MAX_MESSAGE_BYTES
) -> openai.AsyncOpenAI:
    """Return a client of a provider. It waits `silence` seconds for bytes, and takes no message of more bytes."""
    return openai.AsyncOpenAI(
        base_url=str(base_url),
        api_key=_key_reader(api_key_file),
        # Temporal tries again.
        max_retries=0,
        http_client=_bounded_client(max_bytes),
        timeout=openai.Timeout(silence, connect=_CONNECT_SECONDS),
    )


async def ask_for_models(client: openai.AsyncOpenAI) -> None:
    """Ask the provider whether it accepts the key. One that cannot be reached may be back when a job comes.

    Raises EngineDead for a key that is refused.
    """
    try:
        await client.models.list(timeout=_CONNECT_SECONDS)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise EngineDead(f"the provider refuses the key: HTTP {error.status_code}") from error
    except (openai.OpenAIError, OSError) as error:
        log.warning("the provider does not list its models: %s", type(error).__name__)


def _key_reader(path: Path | None) -> str | Callable[[], Awaitable[str]] | None:
    """Return how the client gets the key. None: from its environment variable."""
    if path is None:
        # A provider without callers' keys needs none, and the client refuses to start without one.
        return _checked(os.environ.get("OPENAI_API_KEY") or "none", "OPENAI_API_KEY")

    async def read() -> str:
        try:
            key = (await asyncio.to_thread(path.read_text)).strip()
        except (OSError, ValueError) as error:
            raise EngineFailed(f"the key of the provider cannot be read: {type(error).__name__}") from None
        return _checked(key, "the file of the provider's key")

    return read


def _checked(key: str, source: str) -> str:
    """Return a key that fits a header. Raises EngineFailed for another one: the client's error would show it."""
    if not _KEY.fullmatch(key):
        raise EngineFailed(f"{source} holds no key: one line of visible ASCII characters")
    return key


def _bounded_client(max_bytes: int) -> httpx2.AsyncClient:
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
