"""Waits for a store that is away."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from encryption import KeysUnavailable
from store.store import StoreUnavailable

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = (0.5, 1, 2, 5)
"""Seconds before each further try. The last one repeats."""

_T = TypeVar("_T")


async def patiently(call: Callable[[], Awaitable[_T]]) -> _T:
    """Return what the call of the store returns. It is tried again for as long as the store is away."""
    tries = 0
    while True:
        try:
            return await call()
        except (StoreUnavailable, KeysUnavailable) as error:
            _log.warning("the store is away, it is tried again: %s", error)
        await asyncio.sleep(_RETRY_SECONDS[min(tries, len(_RETRY_SECONDS) - 1)])
        tries += 1
