"""Fetches small documents of other servers, within a time and a size."""

from datetime import timedelta
from ssl import SSLContext
from typing import Any, NamedTuple


class FetchError(Exception):
    """There is no answer. The message says why, with the URL."""


class Answer(NamedTuple):
    """The answer of a server."""

    status: int
    body: bytes


async def fetch(
    method: str, url: str, *, within: timedelta, max_bytes: int, ssl: SSLContext | bool = True, **options: Any
) -> Answer:
    """Return the answer of a server, whatever its status. The proxies of the environment are used.

    `options` are aiohttp's of a request. Raises FetchError also for an answer of more than `max_bytes`.
    """
    # Imported by the first call: most processes fetch nothing, and it takes a fifth of the start of some.
    import aiohttp

    data = bytearray()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(within.total_seconds()), trust_env=True) as session,
            # A redirect could lead from TLS to none.
            session.request(method, url, allow_redirects=False, ssl=ssl, **options) as answer,
        ):
            async for piece in answer.content.iter_any():
                data += piece
                if len(data) > max_bytes:
                    raise FetchError(f"{url}: the answer has more than {max_bytes} bytes")
            return Answer(answer.status, bytes(data))
    except TimeoutError:
        raise FetchError(f"{url}: no answer within {within.total_seconds():g} s") from None
    except (OSError, aiohttp.ClientError, ValueError) as error:
        # ValueError: the URL is none.
        raise FetchError(f"{url} cannot be reached: {error}") from None
