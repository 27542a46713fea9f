"""What durability costs until the first token: milliseconds from the client's Submit to the first delta that it reads.

The simulated engine generates its first token immediately, so all of the time is the suite's: Submit, workflow, task
queue, worker, live feed, stream. Jobs run one after another, in a stack that does little else.

The peer in the same run, on the same Temporal server, is a bare workflow with one remote activity in a process of its
own. Its time is from the client's start_workflow to the first line of the activity. The floors are a gRPC health check
of the gateway, and one call of Temporal that changes nothing.

With `--engine vllm` (in the environment of `make test-vllm` or `make test-gpu`) the model is real. Its own time to the
first token, measured with a bare AsyncLLM in the same run, is subtracted. A further peer is `vllm serve`, over HTTP
with server-sent events. Both get requests as rarely as the engine of the suite, which cools down between jobs: without
pauses a bare AsyncLLM answers in half the time.

    python -m bench.first_token
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from temporalio.client import Client

from bench.peers.bare_workflow import QUEUE, BareWorkflow
from bench.peers.vllm_peers import BareVllm, VllmServe, worker_environment
from bench.support import script
from bench.support.report import Report, quantiles
from bench.support.stacks import beside, new_stack, simulated
from bench.support.watched_job import finish, messages, submit
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 5
    jobs: int = 30
    engine: str = "simulated"
    model_path: str = "models/docstrings"
    engine_options: str = "{}"


Way = Callable[[], Awaitable[float]]
"""Runs one job; returns its milliseconds."""
PROMPT = "Return the"
_REST_SECONDS: Final = 0.04
"""Pause before a request: the time that a job of the suite takes after its first token."""
_SPIN_SECONDS: Final = 1.5
"""Pause before the next way. vLLM's processes busy-wait for a second after each request, which would slow it down."""


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "What does durability cost me until the first token?",
        "ms from Submit to the first token at the client, one job at a time, loopback, no TLS.",
    )
    case = f"{sizes.engine} engine"
    async with all_ways(sizes) as ways:
        for way in ways.values():
            # The first jobs of a process fill its caches.
            for _ in range(min(sizes.jobs, 5)):
                await way()
        for _ in range(sizes.rounds):
            for who, way in ways.items():
                if sizes.engine == "vllm":
                    await asyncio.sleep(_SPIN_SECONDS)
                report.add(case, who, quantiles([await way() for _ in range(sizes.jobs)]))
    if sizes.engine == "simulated":
        report.ratio(case, "p50", "peer_bare_workflow", at_most=1.3)
    else:
        bare = report.rounds(case, "floor_bare_async_llm", "p50")
        added = [all_ - own for all_, own in zip(report.rounds(case, "suite", "p50"), bare, strict=True)]
        workflow = report.rounds(case, "peer_bare_workflow", "p50")
        what = "(suite - bare AsyncLLM) / peer_bare_workflow, p50, vllm engine"
        report.judge(what, [ours / theirs for ours, theirs in zip(added, workflow, strict=True)], at_most=1.3)
        report.ratio(case, "p50", "peer_vllm_serve")
    return report


@asynccontextmanager
async def all_ways(sizes: Sizes) -> AsyncIterator[dict[str, Way]]:
    """Run the stack and the peers, and yield the ways by name."""
    real = sizes.engine == "vllm"
    options = (sizes.model_path, 16, json.loads(sizes.engine_options))
    worker = worker_environment(*options) if real else simulated(tokens_per_second=1000)
    async with AsyncExitStack() as opened:
        stack = opened.enter_context(new_stack({"gpu-worker": worker}, engine=sizes.engine))
        await opened.enter_async_context(stack)
        await opened.enter_async_context(beside("bench.peers.bare_workflow", stack.address("temporal")))
        channel = await opened.enter_async_context(grpc.aio.insecure_channel(stack.address("gateway")))
        temporal = await Client.connect(stack.address("temporal"))
        ways = {"suite": suite(LlmServiceStub(channel)), "peer_bare_workflow": bare_workflow(temporal)}
        if real:
            serve = await opened.enter_async_context(VllmServe.running(*options))
            bare = await opened.enter_async_context(BareVllm.running(*options))
            ways["peer_vllm_serve"] = rested(serve)
            ways["floor_bare_async_llm"] = rested(bare)
        yield ways | {"floor_temporal_call": temporal_call(temporal), "floor_health_check": health_check(channel)}


def suite(stub: LlmServiceStub) -> Way:
    """Return the way through the whole suite."""

    async def run() -> float:
        begin = time.monotonic()
        id_ = await submit(stub, tokens=2, prompt=PROMPT)
        async for message in messages(stub, id_):
            if message.HasField("delta"):
                break
        took = time.monotonic() - begin
        await finish(stub, id_)
        return took * 1000

    return run


def rested(engine: BareVllm | VllmServe) -> Way:
    """Return the way of an engine that gets its requests directly, each after a pause."""

    async def run() -> float:
        await asyncio.sleep(_REST_SECONDS)
        return await engine.first_token_ms(PROMPT)

    return run


def bare_workflow(client: Client) -> Way:
    """Return the way of the peer."""
    ids = count(1)

    async def run() -> float:
        begin = time.monotonic_ns()
        id_ = f"bench-bare-{next(ids)}"
        reached = await client.execute_workflow(BareWorkflow.run, 1, id=id_, task_queue=QUEUE)
        return (reached - begin) / 1e6

    return run


def temporal_call(client: Client) -> Way:
    """Return the floor, an answer of Temporal without any work."""

    async def run() -> float:
        begin = time.monotonic()
        await client.service_client.check_health()
        return (time.monotonic() - begin) * 1000

    return run


def health_check(channel: grpc.aio.Channel) -> Way:
    """Return the floor, an answer of the gateway without any work."""
    stub = health_pb2_grpc.HealthStub(channel)

    async def run() -> float:
        begin = time.monotonic()
        await stub.Check(health_pb2.HealthCheckRequest())
        return (time.monotonic() - begin) * 1000

    return run


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=2, jobs=2), __doc__)
