"""How many jobs go through the stack: jobs submitted and finished per second, with an engine that has no work.

The script also measures the processor time of a job, in all processes that take part, Temporal included. That shows how
many jobs a machine can run, and is accurate on a busy machine, too. Jobs are submitted in two ways:

- watched: 50 clients, each submits a job, watches it to its end and submits the next one;
- unwatched: all jobs are submitted, 50 calls at a time, and nobody watches. The time ends when the last job has closed.

The first peer in the same run, on the same Temporal server, is a bare workflow with two remote activities in a process
of its own, submitted in the same two ways. The second peer is Celery with Redis: a chain of two tasks, with two worker
processes (one for each core here). It keeps results, and all chains are submitted and then awaited. It keeps no
history, and its Redis writes to disk seconds later.

    python -m bench.jobs_per_second
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

import grpc
from temporalio.client import Client

from bench.peers.bare_workflow import QUEUE, BareWorkflow
from bench.peers.celery_peer import running_celery
from bench.support import script
from bench.support.report import Report
from bench.support.stacks import beside, new_stack, simulated
from bench.support.usage import cpu_of, cpu_seconds
from bench.support.watched_job import finish, submit, together
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 5
    jobs: int = 300
    at_once: int = 50


Job = Callable[[], Awaitable[object]]
Way = Callable[[], Awaitable[dict[str, float]]]
"""Runs all jobs of a round; returns the figures."""
ACTIVITIES: Final = 2
_ids = count(1)


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "How many jobs?",
        "Jobs a second, submitted and finished. Engine: simulated, one token, no wait. The end of unwatched jobs is"
        " detected up to 0.2 s late, for suite and bare workflow alike.",
    )
    async with all_ways(sizes) as ways:
        for way in ways.values():
            # The first jobs of a process fill its caches.
            await way()
        for _ in range(sizes.rounds):
            for (case, who), way in ways.items():
                report.add(case, who, await way())
    for case in ("watched", "unwatched"):
        report.ratio(case, "jobs_per_second", "peer_bare_workflow", at_least=0.9)
        report.ratio(case, "cpu_ms_a_job", "peer_bare_workflow")
    report.ratio("unwatched", "jobs_per_second", "peer_celery_redis")
    return report


@asynccontextmanager
async def all_ways(sizes: Sizes) -> AsyncIterator[dict[tuple[str, str], Way]]:
    """Run the stack and the peers, and yield the ways by case and who."""
    async with AsyncExitStack() as opened:
        stack = opened.enter_context(new_stack({"gpu-worker": simulated(tokens_per_second=1e9)}))
        await opened.enter_async_context(stack)
        worker = await opened.enter_async_context(beside("bench.peers.bare_workflow", stack.address("temporal")))
        channel = await opened.enter_async_context(grpc.aio.insecure_channel(stack.address("gateway")))
        celery = await opened.enter_async_context(running_celery())
        client, stub = await Client.connect(stack.address("temporal")), LlmServiceStub(channel)

        async def suite_watched() -> None:
            await finish(stub, await submit(stub, tokens=1))

        async def bare_watched() -> None:
            await client.execute_workflow(BareWorkflow.run, ACTIVITIES, id=f"bare-{next(_ids)}", task_queue=QUEUE)

        async def bare_unwatched() -> None:
            await client.start_workflow(BareWorkflow.run, ACTIVITIES, id=f"bare-{next(_ids)}", task_queue=QUEUE)

        def suite_cpu() -> float:
            return sum(cpu_of(stack).values())

        def bare_cpu() -> float:
            return cpu_of(stack)["temporal"] + cpu_seconds(worker.pid)

        suite_unwatched = partial(closed, client, partial(submit, stub, tokens=1), sizes)
        yield {
            ("watched", "suite"): figures(sizes, partial(timed, suite_watched, sizes), suite_cpu),
            ("watched", "peer_bare_workflow"): figures(sizes, partial(timed, bare_watched, sizes), bare_cpu),
            ("unwatched", "suite"): figures(sizes, suite_unwatched, suite_cpu),
            ("unwatched", "peer_bare_workflow"): figures(
                sizes, partial(closed, client, bare_unwatched, sizes), bare_cpu
            ),
            ("unwatched", "peer_celery_redis"): figures(sizes, partial(celery.seconds_for, sizes.jobs)),
        }


def figures(sizes: Sizes, run: Callable[[], Awaitable[float]], cpu: Callable[[], float] | None = None) -> Way:
    """Return a way that calls `run`, which returns seconds. `cpu` returns the processor seconds so far."""

    async def measured() -> dict[str, float]:
        before = cpu() if cpu else 0.0
        found = {"jobs_per_second": sizes.jobs / await run()}
        return found | ({"cpu_ms_a_job": (cpu() - before) / sizes.jobs * 1000} if cpu else {})

    return measured


async def timed(job: Job, sizes: Sizes) -> float:
    """Run the jobs, `at_once` of them concurrently; return the seconds."""
    begin = time.monotonic()
    await together(sizes.jobs, job, sizes.at_once)
    return time.monotonic() - begin


async def closed(temporal: Client, job: Job, sizes: Sizes) -> float:
    """Start the jobs; return the seconds until Temporal has closed them all."""

    async def count_closed() -> int:
        return (await temporal.count_workflows("ExecutionStatus != 'Running'")).count

    begin, already = time.monotonic(), await count_closed()
    await timed(job, sizes)
    async with asyncio.timeout(300):
        while await count_closed() < already + sizes.jobs:  # noqa: ASYNC110  # another process counts
            await asyncio.sleep(0.2)
    return time.monotonic() - begin


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, jobs=4, at_once=2), __doc__)
