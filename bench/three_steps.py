"""The same program of three steps as a pipeline, on Temporal's plugin for OpenAI's Agents SDK, and on LangGraph.

Each step asks the same upstream, a chat completion of OpenAI's API with a fixed answer, with the text of the last one.
The times are those of the upstream, so that they mean the same for all:

- suite: a pipeline; each step is a job, which a worker with the engine openai runs. It is listed, streamed and counted;
- peer_temporal_openai_agents: a workflow with a run of an agent for each step, as in the plugin's README, on the same
  Temporal server. Its timeout of an activity is 30 s, as there;
- peer_langgraph_sqlite: a graph of three nodes in one process, with its checkpointer on SQLite.

`at the same time`: so many programs begin at once. `one after another`: `ms_between_steps` is from the end of an answer
to the next request of the program. `kill -9 in the second step`: the process that waits for the upstream's answer is
killed, and started again at once. `s_until_it_goes_on` is from the kill to the next request of the program, and
`steps_again` is the number of its requests beyond three. The suite and Temporal detect the loss by themselves, the
suite after a heartbeat's timeout (`--heartbeat-seconds`, 30 by default), the plugin after the activity's. LangGraph
does not: the script names the run to the new process, as somebody would have to.

    make bench-peers
    python -m bench.three_steps
"""

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Final

from bench.peers.openai_upstream import Upstream, running_upstream
from bench.peers.three_step_names import MODEL, STEPS
from bench.support import script
from bench.support.report import Report
from bench.support.stacks import ROOT, new_stack
from bench.support.three_step_ways import SuiteWay, Way, peers_of
from durable_llm import AsyncClient


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 3
    programs: int = 30
    at_once: int = 30
    heartbeat_seconds: float = 30


_INSTALLED: Final = ROOT / "bench" / "support" / "installed"
_HELD_SECONDS: Final = 2
"""Time that the upstream takes for an answer while a process is killed."""
_AT_ONCE: Final = "at the same time"
_IN_TURN: Final = "one after another"
_KILLED: Final = "kill -9 in the second step"
_numbers = count(1)


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "What does a program of three steps cost, beside agent frameworks?",
        f"Steps/s of {sizes.at_once} programs {_AT_ONCE}, ms and s as seen by the upstream, which answers at once, and"
        f" after {_HELD_SECONDS} s where a process is killed.",
    )
    async with running_upstream() as upstream, all_ways(sizes, upstream) as ways:
        for name, way in ways.items():
            # The first program of a process fills its caches.
            await way.run(_run(name))
        for _ in range(sizes.rounds):
            for name, way in ways.items():
                report.add(_AT_ONCE, name, await at_once(way, name, sizes.at_once))
                report.add(_IN_TURN, name, await in_turn(way, name, sizes.programs, upstream))
                report.add(_KILLED, name, await killed(way, name, upstream))
    for peer in ways:
        if peer != "suite":
            report.ratio(_AT_ONCE, "steps_a_second", peer)
            report.ratio(_IN_TURN, "ms_between_steps", peer)
            report.ratio(_KILLED, "s_until_it_goes_on", peer)
    return report


@asynccontextmanager
async def all_ways(sizes: Sizes, upstream: Upstream) -> AsyncIterator[dict[str, Way]]:
    """Run the stack and the peers, and yield the ways by name."""
    async with AsyncExitStack() as opened:
        path = os.pathsep.join(filter(None, (str(_INSTALLED), os.environ.get("PYTHONPATH", ""))))
        options = {"base_url": upstream.url, "context_tokens": 8192}
        gateway = {"PYTHONPATH": path, "GATEWAY_HEARTBEAT_TIMEOUT": f"PT{sizes.heartbeat_seconds}S"}
        worker = {"GPU_WORKER_ENGINE_OPTIONS": json.dumps(options), "GPU_WORKER_MODEL_PATH": MODEL}
        stack = opened.enter_context(new_stack({"gateway": gateway, "gpu-worker": worker}, engine="openai"))
        await opened.enter_async_context(stack)
        client = await opened.enter_async_context(AsyncClient(stack.address("gateway")))
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        peers = await opened.enter_async_context(peers_of(stack, upstream, folder))
        yield {"suite": SuiteWay(stack, client), **peers}


async def at_once(way: Way, name: str, programs: int) -> dict[str, float]:
    """Run programs at the same time, and return how many steps have ended in a second."""
    began = time.monotonic()
    await asyncio.gather(*(way.run(_run(name)) for _ in range(programs)))
    return {"steps_a_second": programs * len(STEPS) / (time.monotonic() - began)}


async def in_turn(way: Way, name: str, programs: int, upstream: Upstream) -> dict[str, float]:
    """Run programs one after another, and return what lies between two steps, and what a program takes."""
    between, took = [], []
    for _ in range(programs):
        run, began = _run(name), time.monotonic()
        await way.run(run)
        took.append((time.monotonic() - began) * 1000)
        asked = upstream.of(run)
        between += [
            (after.began - before.ended) * 1000 for before, after in pairwise(asked) if before.ended is not None
        ]
    return {"ms_between_steps": statistics.median(between), "ms_a_program": statistics.median(took)}


async def killed(way: Way, name: str, upstream: Upstream) -> dict[str, float]:
    """Kill the process in which the second step runs, and return what that costs."""
    upstream.delay = _HELD_SECONDS
    try:
        run, began = _run(name), time.monotonic()
        program = asyncio.create_task(way.run(run))
        second = await upstream.until_asked(run, 2)
        # In the middle of the answer.
        await asyncio.sleep(_HELD_SECONDS / 2)
        since = time.monotonic()
        await way.kill()
        third = await upstream.until_asked(run, 3)
        await program
    finally:
        upstream.delay = 0
    return {
        "s_until_it_goes_on": third.began - since,
        "steps_again": len(upstream.of(run)) - len(STEPS),
        "s_lost": time.monotonic() - began - len(STEPS) * _HELD_SECONDS,
        "same_step": float(third.step == second.step),
    }


def _run(name: str) -> str:
    return f"{name}-{next(_numbers)}"


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, programs=2, at_once=2, heartbeat_seconds=2), __doc__)
