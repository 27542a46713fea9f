"""The maximum silence of a provider: whoever accepts a request and says nothing must not look like a hung engine."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

from jobs.errors import EngineDead, EngineFailed

_T = TypeVar("_T")


async def answer_of(asking: Awaitable[_T], seconds: float) -> _T:
    """Return the beginning of a provider's answer. Raises EngineFailed if none has come within the time."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await asking
    except TimeoutError:
        if not limit.expired():
            raise
        raise _silent(seconds) from None


async def until_silent(
    stream: AsyncIterator[_T], dead: asyncio.Event, patience: Callable[[], float]
) -> AsyncGenerator[_T, None]:
    """Yield the messages of a stream. `patience` returns the maximum wait for the next one, in seconds.

    Raises EngineFailed when none has come within that, and EngineDead once the engine is closed.
    """
    closed = asyncio.ensure_future(dead.wait())
    try:
        while True:
            following, seconds = asyncio.ensure_future(anext(stream, None)), patience()
            try:
                await asyncio.wait({following, closed}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if closed.done():
                    raise EngineDead("the engine was closed")
                if not following.done():
                    raise _silent(seconds)
                if (message := await following) is None:
                    return
            finally:
                following.cancel()
            yield message
    finally:
        closed.cancel()


def _silent(seconds: float) -> EngineFailed:
    return EngineFailed(f"the provider has accepted the request, and has sent nothing for {seconds:g} s")
