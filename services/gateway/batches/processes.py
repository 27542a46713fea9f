"""Runs the steps of batches in processes of their own: see work.py."""

import asyncio
import logging
import os
import subprocess
import sys
from datetime import timedelta
from typing import Final

from google.protobuf.message import Message
from temporalio import activity
from temporalio.exceptions import ApplicationError

from jobs.batches import INPUT_GONE
from services.gateway.batches.work import DAMAGED, GONE, LATER, PLAN

_log = logging.getLogger(__name__)
MAX_PROCESSES: Final = 2
"""Maximum number of such processes. Each takes a core and some 150 MB."""
_HEARTBEAT: Final = timedelta(seconds=5)
_MAX_WORDS: Final = 2000
_NOT_OF_STEPS: Final = (
    "OTEL_",
    "GATEWAY_API_KEYS_FILE",
    "GATEWAY_JWT_",
    "GATEWAY_CLIENT_CERTIFICATES",
    "GATEWAY_TLS_",
)
"""Beginnings of the variables that steps do not get: they have no part in the gateway's traces and metrics, and a file
of credentials that is gone would end them, while the gateway goes on with what it has read."""
_MAX_CRASHES: Final = 10
"""Maximum number of failures of a step for unknown reasons. A gateway that is killed meanwhile does not count."""
CONTENT_UNREADABLE: Final = "CONTENT_UNREADABLE"
STEP_FAILED: Final = "STEP_FAILED"


class Processes:
    """The processes of one gateway. For activities."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(MAX_PROCESSES)

    async def run(self, step: str, task: Message) -> bytes:
        """Return the result of a step. Sends heartbeats meanwhile. Ends the process when it is cancelled.

        Raises ApplicationError: not retryable where content is gone for good, or the step fails again and again.
        """
        crashes = next((found for found in activity.info().heartbeat_details if isinstance(found, int)), 0)
        heartbeats = asyncio.create_task(_keep_alive(crashes))
        try:
            async with self._turns:
                return await _run(step, task.SerializeToString(), crashes)
        finally:
            heartbeats.cancel()


async def _run(step: str, task: bytes, crashes: int) -> bytes:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OF_STEPS)}
    # Nobody calls a step, so it asks for no credentials.
    environment["GATEWAY_HOST"] = "127.0.0.1"
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
    # What it says is for the operator: names of objects and paths, or a traceback.
    _log.error("the step %s has failed: %s", step, words.decode(errors="replace")[-_MAX_WORDS:].strip())
    if process.returncode == GONE:
        # The input that was planned is the batch's own. Before that it is a file, which anybody may delete.
        if step == PLAN:
            raise ApplicationError("the input is gone", type=INPUT_GONE, non_retryable=True)
        message = "a part of the batch is gone from the store, or can never be decrypted again"
        raise ApplicationError(message, type=CONTENT_UNREADABLE, non_retryable=True)
    if process.returncode == DAMAGED:
        raise ApplicationError("the results do not fit the lines", type="RESULTS_DAMAGED", non_retryable=True)
    if process.returncode == LATER:
        raise ApplicationError("the store or a key is away", type="STORE_UNAVAILABLE")
    activity.heartbeat(crashes + 1)
    raise ApplicationError(
        f"the step {step} of the batch has failed: see the log of the gateway",
        type=STEP_FAILED,
        non_retryable=crashes + 1 >= _MAX_CRASHES,
    )


async def _keep_alive(crashes: int) -> None:
    """Send heartbeats, which keep the number of crashes for the next attempt."""
    while True:
        activity.heartbeat(crashes)
        await asyncio.sleep(_HEARTBEAT.total_seconds())
