"""Programs as tests run them."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.paths import ROOT

NODE = ROOT / "clients" / "node"


@dataclass
class Ended:
    """How a program ended."""

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


def missing(what: str) -> NoReturn:
    """Skip the test, where a developer's machine lacks a program; fail where all has to be there, and was before."""
    if os.environ.get("CI") or (NODE / "node_modules").exists():
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")
