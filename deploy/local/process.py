"""One process of the stack, which can be started, awaited, stopped, killed and started again."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Final, Protocol

from deploy.local.errors import ProcessFailed

Probe = Callable[["Process"], Awaitable[bool]]
"""Checks once, within a few seconds, whether the process is ready."""


class Started(Protocol):
    """A program that runs."""

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its group."""

    async def wait(self) -> int:
        """Wait until it ends and return its exit status, -N for signal N."""


_EXEC_WITH_PARENT: Final = str(Path(__file__).with_name("exec_with_parent.py"))
_PROBE_INTERVAL: Final = 0.05


async def execute(
    command: Sequence[str], environment: Mapping[str, str], working_dir: Path, log: BufferedWriter
) -> Started:
    """Start a program in a process group of its own, with all that it prints in the log."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        _EXEC_WITH_PARENT,
        str(os.getpid()),
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        cwd=working_dir,
        # Ctrl-C at the terminal is for the supervisor alone, which stops the rest in order.
        process_group=0,
    )


class Process:
    """A program in its own process group, whose output is appended to a log file.

    It dies with the process that started it (see exec_with_parent), provided that the thread that called start() is
    still alive. When the program ends, its whole group is killed, so that its children never outlive it.
    """

    start_program = staticmethod(execute)
    """How start() starts the program. The tests replace it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        log_path: Path,
        probe: Probe,
        working_dir: Path,
        start_timeout: float,
        stop_grace: float,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.environment = dict(environment)
        """Environment that start() passes. It may be changed between two starts."""
        self.log_path = log_path
        self._probe = probe
        self._working_dir = working_dir
        self._start_timeout = start_timeout
        self._stop_grace = stop_grace
        self._pid = 0
        self._end: asyncio.Task[int] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """The process id, which is also the id of its group; None unless the process runs."""
        return self._pid if self.running else None

    @property
    def returncode(self) -> int | None:
        """Exit status of the last run, -N for signal N; None while it runs and before the first start."""
        return self._end.result() if self._end is not None and self._end.done() else None

    @property
    def ending(self) -> str:
        """Description of how the last run ended."""
        if self.returncode is not None and self.returncode < 0:
            return f"was ended by {signal.Signals(-self.returncode).name}"
        return f"ended with status {self.returncode}"

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._end is not None and not self._end.done()

    @property
    def log(self) -> str:
        """Output of this run so far."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    async def start(self) -> None:
        """Start the process; wait_ready() waits until it is ready. Raises RuntimeError when it runs already."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            started = await self.start_program(self.command, self.environment, self._working_dir, log)
        self._pid = started.pid
        self._end = asyncio.create_task(_end_of_group(started), name=f"end of {self.name}")

    async def wait_ready(self, beside: Iterable["Process"] = ()) -> None:
        """Wait until the probe succeeds. Raises ProcessFailed when the process ends first or takes too long.

        Raises it also when one of those that started `beside` this one ends first.
        """
        since = time.monotonic()
        while True:
            if not self.running:
                raise self.failure(f"{self.ending} before it was ready")
            for other in beside:
                if not other.running:
                    raise other.failure(f"{other.ending} before {self.name} was ready")
            if await self._probe(self):
                return
            if time.monotonic() - since > self._start_timeout:
                raise self.failure(f"was not ready within {self._start_timeout:g} s (STACK_START_TIMEOUT)")
            await asyncio.sleep(_PROBE_INTERVAL)

    async def wait(self) -> int:
        """Wait until the whole group has ended, and return the exit status. Raises RuntimeError before start()."""
        if self._end is None:
            raise RuntimeError(f"{self.name} was never started")
        return await asyncio.shield(self._end)

    async def terminate(self) -> None:
        """Send SIGTERM and wait; kill the process after the grace. Does nothing when it does not run."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._stop_grace):
                await self._wait_if_running()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """Kill the process and its children with SIGKILL and wait. Does nothing when it does not run."""
        if self.running:
            _kill_group(self._pid)
            await self._wait_if_running()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to its children. Does nothing when it does not run."""
        if self.running:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def failure(self, reason: str) -> ProcessFailed:
        """Return an error with the reason and the end of the log."""
        return ProcessFailed(self.name, reason, self.log_path, self.log.splitlines()[-15:])

    async def _wait_if_running(self) -> None:
        if self.running:
            await self.wait()


async def _end_of_group(process: Started) -> int:
    status = await process.wait()
    # Immediately, before another group can get the id.
    _kill_group(process.pid)
    return status


def _kill_group(pid: int) -> None:
    # macOS answers EPERM for a group that holds only zombies.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
