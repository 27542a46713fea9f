"""Tasks that run concurrently with the main work of a process."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta

_log = logging.getLogger(__name__)


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


async def sweeping(
    what: str, interval: timedelta, sweep: Callable[[], Awaitable[int]], *expected: type[Exception]
) -> None:
    """Sweep at an interval until cancelled; never if the interval is 0.

    `what` names what is swept in the log, `sweep` returns the number of objects that it has removed. An error ends a
    sweep, and the next one looks at everything again. One that is `expected` is logged without its traceback.
    """
    while interval:
        await asyncio.sleep(interval.total_seconds())
        try:
            _log.info("the sweep of %s has removed %d objects", what, await sweep())
        except expected as error:
            _log.warning("the sweep of %s has not come to its end: %r", what, error)
        except Exception:  # noqa: BLE001  # whatever it was, the process has to go on
            _log.exception("the sweep of %s has failed", what)
