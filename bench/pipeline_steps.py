"""What a step of a pipeline costs more than a bare child workflow: time, processor time, events and bytes of history.

A step is a whole job: checked, listed, streamed, counted, cancelled. It generates one token, with an engine that has no
work. Two programs run: steps one after another, and all of them at the same time.

The peer in the same run, on the same Temporal server, is a parent with a child workflow of one remote activity for each
step, in a process of its own.

    python -m bench.pipeline_steps
"""

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

from google.protobuf.any_pb2 import Any
from google.protobuf.wrappers_pb2 import Int32Value
from temporalio.client import Client

from bench.peers.bare_children import QUEUE, BareParent
from bench.support import script
from bench.support.report import Report
from bench.support.stacks import ROOT, beside, new_stack, simulated
from bench.support.usage import cpu_of, cpu_seconds
from durable_llm import AsyncClient
from llm_pb import llm_pb2


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 5
    steps: int = 50


Program = Callable[[], Awaitable[str]]
"""Runs a program to its end; returns its workflow id."""
_INSTALLED: Final = ROOT / "bench" / "support" / "installed"
_AT_ONCE: Final = {"one after another": False, "at the same time": True}
_ids = count(1)


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "What does a step of a pipeline cost?",
        f"Per step, in programs of {sizes.steps} steps. Engine: simulated, one token, no wait. Events and bytes are"
        " those of the program's own history, which Temporal bounds to 51,200 and 50 MiB.",
    )
    async with all_ways(sizes) as ways:
        for way in ways.values():
            # The first program of a process fills its caches.
            await way()
        for _ in range(sizes.rounds):
            for (case, who), way in ways.items():
                report.add(case, who, await way())
    for case in _AT_ONCE:
        for figure in ("ms_a_step", "cpu_ms_a_step", "events_a_step", "bytes_a_step"):
            report.ratio(case, figure, "peer_bare_children")
    return report


@asynccontextmanager
async def all_ways(sizes: Sizes) -> AsyncIterator[dict[tuple[str, str], Callable[[], Awaitable[dict[str, float]]]]]:
    """Run the stack and the peer, and yield the ways by case and who."""
    async with AsyncExitStack() as opened:
        path = os.pathsep.join(filter(None, (str(_INSTALLED), os.environ.get("PYTHONPATH", ""))))
        environment = {"gateway": {"PYTHONPATH": path}, "gpu-worker": simulated(tokens_per_second=1e9)}
        stack = opened.enter_context(new_stack(environment))
        await opened.enter_async_context(stack)
        worker = await opened.enter_async_context(beside("bench.peers.bare_children", stack.address("temporal")))
        client = await opened.enter_async_context(AsyncClient(stack.address("gateway")))
        temporal = await Client.connect(stack.address("temporal"))

        async def suite(name: str) -> str:
            steps = Any()
            steps.Pack(Int32Value(value=sizes.steps))
            started = await client.pipelines.submit(user_id="bench", custom={"name": name, "input": steps})
            ended = await client.pipelines.result(started.pipeline_id)
            assert ended.status.state == llm_pb2.JOB_STATE_SUCCEEDED, ended.status
            return started.pipeline_id

        async def bare(at_once: bool) -> str:  # an argument of the workflow
            id_ = f"bare-{next(_ids)}"
            await temporal.execute_workflow(BareParent.run, args=(sizes.steps, at_once), id=id_, task_queue=QUEUE)
            return id_

        def suite_cpu() -> float:
            return sum(cpu_of(stack).values())

        def bare_cpu() -> float:
            return cpu_of(stack)["temporal"] + cpu_seconds(worker.pid)

        yield {
            (case, who): partial(figures, temporal, sizes.steps, program, cpu)
            for case, at_once in _AT_ONCE.items()
            for who, program, cpu in (
                ("suite", partial(suite, "fan" if at_once else "steps"), suite_cpu),
                ("peer_bare_children", partial(bare, at_once), bare_cpu),
            )
        }


async def figures(temporal: Client, steps: int, program: Program, cpu: Callable[[], float]) -> dict[str, float]:
    """Run a program, and return what a step of it has cost. `cpu` returns the processor seconds so far."""
    before, began = cpu(), time.monotonic()
    id_ = await program()
    seconds, spent = time.monotonic() - began, cpu() - before
    info = (await temporal.get_workflow_handle(id_).describe()).raw_description.workflow_execution_info
    return {
        "ms_a_step": seconds / steps * 1000,
        "cpu_ms_a_step": spent / steps * 1000,
        "events_a_step": info.history_length / steps,
        "bytes_a_step": info.history_size_bytes / steps,
    }


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, steps=3), __doc__)
