"""How tests run programs."""

import asyncio
import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support import fork_server
from tests.support.paths import ROOT

NODE = ROOT / "clients" / "node"


@dataclass
class Ended:
    """Exit status and output of a program that ended."""

    status: int
    output: str
    errors: str


async def start(*command: str, cwd: Path = ROOT, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(*command: str, cwd: Path = ROOT, **environment: str) -> Ended:
    process = await start(*command, cwd=cwd, **environment)
    output, errors = await process.communicate()
    return Ended(process.returncode or 0, output.decode(), errors.decode())


async def run_service(service: str, folder: Path, **environment: str) -> Ended:
    """Run a service that ends by itself. What it prints is its output, errors included."""
    log = folder / "log"
    with log.open("wb") as file:
        command = (sys.executable, "-m", f"services.{service}")
        process = await fork_server.start(command, {**os.environ, **environment}, ROOT, file)
    return Ended(await process.wait(), log.read_text(), "")


def missing(what: str) -> NoReturn:
    """Skip the test because a program is missing. Fail it in CI, and where Node's packages are installed."""
    if os.environ.get("CI") or (NODE / "node_modules").exists():
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


def interrupt(pid: int) -> None:
    """Send SIGINT to a process, as Ctrl-C does."""
    os.kill(pid, signal.SIGINT)


def interrupt_another_thread(pid: int) -> None:
    """Send SIGINT to another thread. The main thread stays asleep, as after a signal just before its sleep."""
    if sys.platform != "linux":
        pytest.skip("only Linux sends a signal to one thread")
    thread = max(int(thread) for thread in os.listdir(f"/proc/{pid}/task"))
    assert thread != pid
    assert ctypes.CDLL(None).tgkill(pid, thread, signal.SIGINT) == 0
