"""Bounds failed attempts to sign in.

Nobody can guess a key, but each guess costs the gateway or the OpenID provider a call.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

from starlette.requests import Request

from runtime.keyed_limiter import KeyedLimiter
from runtime.token_bucket import TokenBucket
from services.http.failures import Failure

BURST: Final = 10
"""Number of attempts that may fail in a row."""
_INTERVAL: Final = timedelta(seconds=6)
"""After this time one more may fail."""
_AT_ONCE: Final = 4
_MAX_CLIENTS: Final = 10_000
"""Maximum number of clients whose failures are remembered: those who failed last."""


class Attempts:
    """Attempts to sign in, by the address of the client."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, TokenBucket] = OrderedDict()
        self._running = KeyedLimiter(
            _AT_ONCE, lambda: _too_many("too many attempts to sign in run at once", timedelta(seconds=1))
        )

    @asynccontextmanager
    async def attempt(self, request: Request) -> AsyncIterator["Attempt"]:
        """Count an attempt while the context is open.

        Raises Failure, 429, after too many failures and while too many attempts run.
        """
        client = _client(request)
        bucket = self._failures.get(client)
        if bucket is not None and not bucket.available:
            raise _too_many("too many attempts to sign in have failed", _INTERVAL)
        async with self._running.acquired(client):
            attempt = Attempt()
            try:
                yield attempt
            finally:
                if attempt.failed:
                    self._count(client)

    def _count(self, client: str) -> None:
        bucket = self._failures.pop(client, None) or TokenBucket(1 / _INTERVAL.total_seconds(), BURST)
        bucket.take()
        self._failures[client] = bucket
        if len(self._failures) > _MAX_CLIENTS:
            self._failures.popitem(last=False)


class Attempt:
    """One attempt."""

    failed = False
    """Whether it counts as a failure."""


def _client(request: Request) -> str:
    """Return the address that identifies the client: of IPv6 the /64 network, which one host may have as a whole."""
    host = request.client.host if request.client is not None else ""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str(ip_network((address, 64), strict=False)) if isinstance(address, IPv6Address) else host


def _too_many(why: str, wait: timedelta) -> Failure:
    words = f"{why}; try again in a moment"
    return Failure(HTTPStatus.TOO_MANY_REQUESTS, words, "LIMIT_REACHED", retry_after=wait)
