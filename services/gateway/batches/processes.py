"""Runs the steps of batches in processes of their own: see work.py."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Final

from google.protobuf.message import Message
from temporalio import activity
from temporalio.exceptions import ApplicationError

from jobs.batches import INPUT_GONE
from services.gateway.batches.work import DAMAGED, DONE, FAILED, GONE, LATER, PLAN

_log = logging.getLogger(__name__)
MAX_PROCESSES: Final = 2
"""Maximum number of such processes. Each takes a core and some 150 MB, the program that forks them another 110."""
HEARTBEAT: Final = timedelta(seconds=5)
_MAX_WORDS: Final = 2000
_PIECE_BYTES: Final = 256 * 1024
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
        self._forks: _Forks | None = None

    async def run(self, step: str, task: Message) -> bytes:
        """Return the result of a step. Sends heartbeats meanwhile. Ends the process when it is cancelled.

        Raises ApplicationError: not retryable where content is gone for good, or the step fails again and again.
        """
        crashes = next((found for found in activity.info().heartbeat_details if isinstance(found, int)), 0)
        heartbeats = asyncio.create_task(_keep_alive(crashes))
        try:
            async with self._turns:
                status, rest = await _ask(self._connection(), step, task.SerializeToString())
        finally:
            heartbeats.cancel()
        return _result_of(step, status, rest, crashes)

    def _connection(self) -> socket.socket:
        """Return a connection to a new process."""
        ours, its = socket.socketpair()
        with its:
            if self._forks is None or not self._forks.fork(its):
                self._forks = _Forks()
                self._forks.fork(its)
        return ours


class _Forks:
    """The program that forks the processes: see work.py."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OF_STEPS)}
        # Nobody calls a step, so it asks for no credentials.
        environment["GATEWAY_HOST"] = "127.0.0.1"
        self._channel, its = socket.socketpair()
        with its:
            # Popen uses vfork(). uvloop's own subprocesses use fork(), whose handlers may wait for ever in the child
            # for a lock that another thread of the gateway held, and the event loop waits for the child.
            process = subprocess.Popen(  # noqa: S603  # ours; it returns once the program is loaded
                [sys.executable, "-m", "services.gateway.batches.work", str(its.fileno())],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[its.fileno()],
            )
        weakref.finalize(self, _end, process, self._channel)

    def fork(self, connection: socket.socket) -> bool:
        """Start a process that serves a connection; return False if the program has ended."""
        try:
            socket.send_fds(self._channel, [b"\0"], [connection.fileno()])
        except OSError:
            return False
        return True


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.kill()
    process.wait()


async def _ask(connection: socket.socket, step: str, task: bytes) -> tuple[int, bytes]:
    """Return the status of a process, and what it says next. A cancel ends the process."""
    loop, answer = asyncio.get_running_loop(), bytearray()
    with connection:
        connection.setblocking(False)
        with suppress(ConnectionError):
            await loop.sock_sendall(connection, f"{step} {len(task)}\n".encode() + task)
            while piece := await loop.sock_recv(connection, _PIECE_BYTES):
                answer += piece
    head, end, rest = bytes(answer).partition(b"\n")
    status, size = map(int, head.split()) if end else (FAILED, -1)
    return (status, rest) if len(rest) == size else (FAILED, b"the process was killed")


def _result_of(step: str, status: int, rest: bytes, crashes: int) -> bytes:
    """Return the result of a step. Raises ApplicationError for any status but DONE."""
    if status == DONE:
        return rest
    # What it says is for the operator: names of objects and paths, or a traceback.
    _log.error("the step %s has failed: %s", step, rest.decode(errors="replace")[-_MAX_WORDS:].strip())
    if status == GONE:
        # The input that was planned is the batch's own. Before that it is a file, which anybody may delete.
        if step == PLAN:
            raise ApplicationError("the input is gone", type=INPUT_GONE, non_retryable=True)
        message = "a part of the batch is gone from the store, or can never be decrypted again"
        raise ApplicationError(message, type=CONTENT_UNREADABLE, non_retryable=True)
    if status == DAMAGED:
        raise ApplicationError("the results do not fit the lines", type="RESULTS_DAMAGED", non_retryable=True)
    if status == LATER:
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
        await asyncio.sleep(HEARTBEAT.total_seconds())
