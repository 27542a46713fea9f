"""Runs the stack for the scripts of bench/, and other processes next to it: peers and floors."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.local.settings import StackSettings
from deploy.local.stack import Stack

KINDS: Final = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
"""The processes that run: all except the codec server, which no job needs."""

ROOT: Final = Path(__file__).parents[2]
START_SECONDS: Final = 300
"""Maximum time until a process is ready, for those that load a model."""


@contextmanager
def new_stack(
    environment: Mapping[str, Mapping[str, str]] | None = None, *, engine: str = "simulated", workers: int = 1
) -> Iterator[Stack]:
    """Yield a stack that is not started, with the settings of `make up`, free ports and a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        settings = StackSettings.with_free_ports(
            state_dir=Path(folder), engine=engine, gpu_workers=workers, start_timeout=START_SECONDS
        )
        yield Stack(settings, only=KINDS, environment=environment)


def simulated(**options: float) -> dict[str, str]:
    """Return the environment of a GPU worker whose simulated engine has these options."""
    return {"GPU_WORKER_ENGINE_OPTIONS": json.dumps(options)}


def models(*entries: tuple[str, str], tokens: int = 8192) -> dict[str, str]:
    """Return the environment of a gateway that serves these models, each a name and the queue of its workers."""
    sizes = {"context_tokens": tokens, "max_output_tokens": tokens, "default_max_tokens": 64}
    return {"GATEWAY_MODELS": json.dumps([{"name": name, "queue": queue, **sizes} for name, queue in entries])}


@dataclass(frozen=True)
class Beside:
    """A process that runs next to the stack."""

    pid: int
    ready: str
    """The line with which the process reported that it is ready."""


@asynccontextmanager
async def beside(module: str, *arguments: str) -> AsyncIterator[Beside]:
    """Start `python -m module arguments`, wait until it reports that it is ready, and kill it when the context ends.

    Raises RuntimeError when it ends before it is ready.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"{module} ended before it was ready")
        yield Beside(process.pid, line.decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
