"""Runs the steps of batches in processes of their own: see work.py."""

import asyncio
import os
import subprocess
import sys
from datetime import timedelta
from typing import Final

from google.protobuf.message import Message
from temporalio import activity
from temporalio.exceptions import ApplicationError

from services.gateway.batches.work import DAMAGED, GONE, LATER

_AT_ONCE: Final = 2
"""Maximum number of such processes. Each takes a core and some 150 MB."""
_HEARTBEAT: Final = timedelta(seconds=5)
_MAX_WORDS: Final = 2000
CONTENT_UNREADABLE: Final = "CONTENT_UNREADABLE"
STEP_FAILED: Final = "STEP_FAILED"


class Processes:
    """The processes of one gateway. For activities."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def run(self, step: str, task: Message) -> bytes:
        """Return the result of a step. Sends heartbeats meanwhile. Ends the process when it is cancelled.

        Raises ApplicationError: not retryable where content is gone for good.
        """
        heartbeats = asyncio.create_task(_keep_alive())
        try:
            async with self._turns:
                return await _run(step, task.SerializeToString())
        finally:
            heartbeats.cancel()


async def _run(step: str, task: bytes) -> bytes:
    # The steps have no part in the traces and metrics of the gateway.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    # Popen uses vfork(). uvloop's own subprocesses use fork(), whose handlers may wait for ever in the child for a lock
    # that another thread of the gateway held, and the event loop waits for the child.
    process = subprocess.Popen(  # noqa: ASYNC220, S603 -- ours; it returns once the program is loaded
        [sys.executable, "-m", "services.gateway.batches.work", step],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        result, words = await asyncio.to_thread(process.communicate, task)
    finally:
        process.kill()
    if process.returncode == 0:
        return result
    message = words.decode(errors="replace")[-_MAX_WORDS:].strip()
    if process.returncode == GONE:
        raise ApplicationError(message, type=CONTENT_UNREADABLE, non_retryable=True)
    if process.returncode == DAMAGED:
        raise ApplicationError(message, type="RESULTS_DAMAGED", non_retryable=True)
    if process.returncode == LATER:
        raise ApplicationError(message, type="STORE_UNAVAILABLE")
    raise ApplicationError(f"the step {step} of a batch has failed: {message}", type=STEP_FAILED)


async def _keep_alive() -> None:
    while True:
        activity.heartbeat()
        await asyncio.sleep(_HEARTBEAT.total_seconds())
