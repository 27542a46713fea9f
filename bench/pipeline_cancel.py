"""How long a pipeline takes to end after a cancel, with many jobs that generate at that time.

`ms_answered` is the answer to CancelPipeline. `ms_ended` is the last message of a StreamPipeline that was open before.
By then all jobs have ended, their output is kept, and the tree tells what each has used. Each job generates ten tokens
a second, by the simulated engine. `cpu_ms` is the processor time of all processes of the stack meanwhile.

The peer in the same run, on the same Temporal server, is a parent workflow whose child workflows wait for a timer,
cancelled by Temporal's own client: its `ms_answered` is the answer to that call, `ms_ended` its result. Its `cpu_ms` is
that of Temporal and of its own process. It has no activity that has to stop, and keeps nothing.

    python -m bench.pipeline_cancel
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.wrappers_pb2 import Int32Value
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode

from bench.peers.bare_children import QUEUE, WaitingParent
from bench.support import script
from bench.support.report import Report, rotated
from bench.support.stacks import ROOT, beside, models, new_stack, simulated
from bench.support.usage import cpu_of, cpu_seconds
from durable_llm import AsyncClient
from jobs import names
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 5
    few: int = 20
    many: int = 100


AIM_FEW_MS: Final = 1000
AIM_MANY_MS: Final = 10_000
_PEER: Final = "peer_bare_children"
_INSTALLED: Final = ROOT / "bench" / "support" / "installed"
_WAITS: Final = 5
"""Events of a child workflow that waits: it was started, has had its first task, and has begun its timer."""
_ids = count(1)

Cancels = Callable[[int], Awaitable[dict[str, float]]]
"""Begins a program of so many leaves, cancels it once all are there, and returns the figures."""


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "How long does a pipeline take to end after a cancel?",
        "ms from the call of CancelPipeline, in a stack that does nothing else. Engine: simulated, 10 tokens/s a job.",
    )
    cases = {sizes.few: AIM_FEW_MS, sizes.many: AIM_MANY_MS}
    async with all_ways() as ways:
        for way in ways.values():
            # The first program of a process fills its caches.
            await way(sizes.few)
        for number in range(sizes.rounds):
            for leaves in cases:
                for who in rotated(ways, number):
                    report.add(f"{leaves} leaves", who, await ways[who](leaves))
    for leaves, aim in cases.items():
        case = f"{leaves} leaves"
        report.judge(f"ms_ended, suite, {case}", report.rounds(case, "suite", "ms_ended"), at_most=aim)
        for figure in ("ms_ended", "cpu_ms"):
            report.ratio(case, figure, _PEER)
    return report


@asynccontextmanager
async def all_ways() -> AsyncIterator[dict[str, Cancels]]:
    """Run the stack and the peer, and yield the ways by who."""
    async with AsyncExitStack() as opened:
        path = os.pathsep.join(filter(None, (str(_INSTALLED), os.environ.get("PYTHONPATH", ""))))
        environment = {
            "gateway": {"PYTHONPATH": path, **models(("docstrings", names.GPU_QUEUE))},
            "gpu-worker": {**simulated(tokens_per_second=10), "GPU_WORKER_MAX_CONCURRENT": "1024"},
        }
        stack = opened.enter_context(new_stack(environment))
        await opened.enter_async_context(stack)
        worker = await opened.enter_async_context(beside("bench.peers.bare_children", stack.address("temporal")))
        client = await opened.enter_async_context(AsyncClient(stack.address("gateway")))
        channel = await opened.enter_async_context(grpc.aio.insecure_channel(stack.address("gateway")))
        temporal = await Client.connect(stack.address("temporal"))
        yield {
            "suite": partial(suite, client, LlmServiceStub(channel), lambda: sum(cpu_of(stack).values())),
            _PEER: partial(bare, temporal, lambda: cpu_of(stack)["temporal"] + cpu_seconds(worker.pid)),
        }


async def suite(client: AsyncClient, jobs: LlmServiceStub, cpu: Callable[[], float], leaves: int) -> dict[str, float]:
    """Cancel a pipeline. `cpu` returns the processor seconds so far."""
    spec = Any()
    spec.Pack(Int32Value(value=leaves))
    id_ = (await client.pipelines.submit(user_id="bench", custom={"name": "endless", "input": spec})).pipeline_id
    watching = asyncio.create_task(_end_of(client, id_))
    for number in range(leaves):
        await _generates(jobs, f"{id_}/parts/{number}/write")
    begin, used = time.perf_counter(), cpu()
    await client.pipelines.cancel(id_)
    answered = time.perf_counter()
    status = await watching
    figures = _figures(begin, answered, cpu() - used)
    assert status.state == llm_pb2.JOB_STATE_CANCELLED, status
    assert status.root.counts.cancelled == leaves, status.root.counts
    return figures


async def bare(temporal: Client, cpu: Callable[[], float], leaves: int) -> dict[str, float]:
    """Cancel a parent workflow. `cpu` returns the processor seconds so far."""
    id_ = f"bare-{next(_ids)}"
    parent = await temporal.start_workflow(WaitingParent.run, leaves, id=id_, task_queue=QUEUE)
    watching = asyncio.create_task(_closed(parent))
    for number in range(leaves):
        await _waits(temporal, f"{id_}/{number}")
    begin, used = time.perf_counter(), cpu()
    await parent.cancel()
    answered = time.perf_counter()
    await watching
    return _figures(begin, answered, cpu() - used)


def _figures(begin: float, answered: float, cpu: float) -> dict[str, float]:
    ended = time.perf_counter()
    return {"ms_answered": (answered - begin) * 1000, "ms_ended": (ended - begin) * 1000, "cpu_ms": cpu * 1000}


async def _end_of(client: AsyncClient, id_: str) -> pipeline_pb2.PipelineStatus:
    """Follow a pipeline to its end; return its status then."""
    status = pipeline_pb2.PipelineStatus()
    async for message in client.pipelines.watch(id_):
        if message.HasField("status"):
            status = message.status
    return status


async def _generates(jobs: LlmServiceStub, id_: str) -> None:
    """Wait until a job has generated something."""
    while True:
        try:
            found = await jobs.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
        except grpc.aio.AioRpcError as error:
            # The step has not begun.
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
        else:
            if found.status.progress.output_tokens:
                return
        await asyncio.sleep(0.1)


async def _waits(temporal: Client, id_: str) -> None:
    """Wait until a child workflow waits for its timer."""
    while True:
        try:
            if (await temporal.get_workflow_handle(id_).describe()).history_length >= _WAITS:
                return
        except RPCError as error:
            # It has not begun.
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
        await asyncio.sleep(0.1)


async def _closed(parent: WorkflowHandle[WaitingParent, None]) -> None:
    try:
        await parent.result()
    except WorkflowFailureError:
        return


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, few=2, many=3), __doc__)
