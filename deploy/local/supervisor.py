"""Keeps a stack running: restarts each process that ends, a limited number of times."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Final, NoReturn

from deploy.local.errors import ProcessFailed
from deploy.local.process import Process
from deploy.local.stack import Report, Stack

PAUSES: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each restart. After the last one the process is given up."""
_STEADY: Final = 60.0
"""Seconds of running after which a process has all its restarts again."""


async def supervise(stack: Stack, work: Awaitable[None], report: Report, pauses: Sequence[float] = PAUSES) -> None:
    """Await the work, and meanwhile restart processes that end, after these pauses.

    Return when the work is done. Raises the error of the work, and ProcessFailed for a process that keeps ending.
    """
    tasks = [asyncio.ensure_future(work)]
    tasks += [asyncio.create_task(_keep_running(process, report, pauses)) for process in stack.processes.values()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _keep_running(process: Process, report: Report, pauses: Sequence[float]) -> NoReturn:
    left = iter(pauses)
    while True:
        since = time.monotonic()
        await process.wait()
        if time.monotonic() - since > _STEADY:
            left = iter(pauses)
        pause = next(left, None)
        if pause is None:
            raise process.failure(f"{process.ending} again, after {len(pauses)} restarts")
        report(process.name, f"{process.ending}; starts again in {pause:g} s (log: {process.log_path})")
        await asyncio.sleep(pause)
        await process.start()
        try:
            await process.wait_ready()
        except ProcessFailed:
            # The next iteration counts this as another end.
            await process.kill()
        else:
            report(process.name, "ready again")
