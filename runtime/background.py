"""Tasks that run concurrently with the main work of a process."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager


@asynccontextmanager
async def beside(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run coroutines while the context is open, and cancel those that run until its end.

    When one raises, the body is cancelled and the context raises the same: a process without it would go on and do a
    part of its work, without the checks of credentials, say. One that returns had no more to do.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in work]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as errors:
        # The body's own error, too, comes as a group.
        if len(errors.exceptions) > 1:
            raise
        (error,) = errors.exceptions
        raise error from error.__cause__
