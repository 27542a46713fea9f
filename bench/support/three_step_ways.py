"""The ways to run the program of bench.three_steps: a pipeline of the suite, and its peers."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

from google.protobuf.any_pb2 import Any
from google.protobuf.wrappers_pb2 import StringValue
from temporalio.client import Client

from bench.peers.openai_upstream import Upstream
from bench.peers.three_step_names import QUEUE, WORKFLOW
from bench.support.stacks import ROOT
from deploy.local.stack import Stack
from durable_llm import AsyncClient
from llm_pb import llm_pb2

PEERS: Final = ROOT / ".tools" / "bench-peers" / "bin" / "python"
"""The Python of an environment that has the peers: `make bench-peers`."""


class Way(Protocol):
    """One way to run the program."""

    async def run(self, run: str) -> None:
        """Run the program once, from its start to its end."""

    async def kill(self) -> None:
        """Kill the process in which steps run with SIGKILL, and start it again at once."""


class SuiteWay:
    """A pipeline, whose jobs run at the upstream by the engine openai."""

    def __init__(self, stack: Stack, client: AsyncClient) -> None:
        self._worker = stack.processes["gpu-worker"]
        self._client = client

    async def run(self, run: str) -> None:
        """See Way."""
        value = Any()
        value.Pack(StringValue(value=run))
        started = await self._client.pipelines.submit(user_id="bench", custom={"name": "three", "input": value})
        ended = await self._client.pipelines.result(started.pipeline_id)
        if ended.status.state != llm_pb2.JOB_STATE_SUCCEEDED:
            raise RuntimeError(f"the pipeline has not succeeded: {ended.status}")

    async def kill(self) -> None:
        """See Way."""
        await self._worker.kill()
        await self._worker.start()


class _Child:
    """A process in the environment of the peers, which prints "ready" and then what has ended."""

    def __init__(self, *command: str) -> None:
        self._command = (str(PEERS), "-m", *command)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it is ready."""
        pipe = asyncio.subprocess.PIPE
        # What it prints about attempts that fail is no part of the report.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, cwd=ROOT, env=environment
        )
        if await self.line() != "ready":
            raise RuntimeError(f"{self._command[2]} ended before it was ready")

    async def line(self) -> str:
        """Return the next line that it prints; empty once it has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def kill(self) -> None:
        """Kill it, if it runs."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()


class AgentsWay:
    """Temporal's plugin for OpenAI's Agents SDK, on the Temporal server of the suite."""

    def __init__(self, temporal: Client, child: _Child) -> None:
        self._temporal = temporal
        self._child = child

    async def run(self, run: str) -> None:
        """See Way."""
        await self._temporal.execute_workflow(WORKFLOW, run, id=f"three-{run}", task_queue=QUEUE)

    async def kill(self) -> None:
        """See Way."""
        await self._child.kill()
        await self._child.start()


class LangGraphWay:
    """LangGraph. Nothing runs its process again: what has to go on is told to the new one by this class."""

    def __init__(self, child: _Child) -> None:
        self._child = child
        self._waiting: dict[str, asyncio.Event] = {}
        self._reading: asyncio.Task[None] | None = None

    async def run(self, run: str) -> None:
        """See Way."""
        ended = self._waiting[run] = asyncio.Event()
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        self._child.tell(run)
        await ended.wait()
        del self._waiting[run]

    async def kill(self) -> None:
        """See Way."""
        await self._child.kill()
        if self._reading is not None:
            await self._reading
        await self._child.start()
        self._reading = asyncio.create_task(self._read())
        for run in self._waiting:
            self._child.tell(run)

    async def _read(self) -> None:
        """Note what has ended, until the process has."""
        while run := await self._child.line():
            self._waiting[run].set()


@asynccontextmanager
async def peers_of(stack: Stack, upstream: Upstream, folder: Path) -> AsyncIterator[dict[str, Way]]:
    """Run the peers while the context is open, and yield their ways by name; none if they are not installed."""
    if not PEERS.exists():
        print("The peers are not installed: make bench-peers", file=sys.stderr)
        yield {}
        return
    temporal = stack.address("temporal")
    agents = _Child("bench.peers.agents_program", temporal, upstream.url)
    graphs = _Child("bench.peers.langgraph_program", upstream.url, str(folder / "checkpoints.sqlite"))
    async with AsyncExitStack() as opened:
        for child in (agents, graphs):
            opened.push_async_callback(child.kill)
            await child.start()
        yield {
            "peer_temporal_openai_agents": AgentsWay(await Client.connect(temporal), agents),
            "peer_langgraph_sqlite": LangGraphWay(graphs),
        }
