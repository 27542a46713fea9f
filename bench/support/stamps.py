"""Text that says when it was made, so that whoever reads it, in any process of this machine, knows how old it is."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass


def stamp() -> str:
    """Return a piece of text that stands for a token made now."""
    # Linux has one monotonic clock for all processes, and nothing ever sets it.
    return f"{time.monotonic_ns()} "


@dataclass(frozen=True)
class Read:
    """A stamp that was read, both times in nanoseconds."""

    made: int
    read: int

    @property
    def age(self) -> float:
        """From made to read, in milliseconds."""
        return (self.read - self.made) / 1e6


def read_stamps(text: str) -> list[Read]:
    """Return the stamps of a text that was received just now."""
    now = time.monotonic_ns()
    return [Read(int(made), now) for made in text.split()]


async def paced(count: int, per_second: float) -> AsyncGenerator[str, None]:
    """Yield stamps at an even pace, made when they are yielded."""
    due = asyncio.get_running_loop().time()
    for _ in range(count):
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        due += 1 / per_second
        yield stamp()
