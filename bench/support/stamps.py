"""Text that holds the time of its creation, so that a reader in any process of this machine knows its age."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass


def stamp() -> str:
    """Return the text of a token that is generated now."""
    # Linux has one monotonic clock for all processes, which nothing can set.
    return f"{time.monotonic_ns()} "


@dataclass(frozen=True)
class Read:
    """A stamp that was read, both times in nanoseconds."""

    made: int
    read: int

    @property
    def age(self) -> float:
        """Milliseconds from `made` to `read`."""
        return (self.read - self.made) / 1e6


def read_stamps(text: str) -> list[Read]:
    """Return the stamps in a text that was received now."""
    now = time.monotonic_ns()
    return [Read(int(made), now) for made in text.split()]


async def paced(count: int, per_second: float) -> AsyncGenerator[str, None]:
    """Yield stamps at an even pace, each with the time at which it is yielded."""
    due = asyncio.get_running_loop().time()
    for _ in range(count):
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        due += 1 / per_second
        yield stamp()
