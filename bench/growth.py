"""How the cost of a job grows with workers, with the queue and with the output. It should not grow.

- workers: the same number of jobs runs on 1, 2 and 4 GPU workers, whose engine has no work. The cost is the processor
  time of all processes of the stack (Temporal, NATS, gateway, workers, notifier) per job.
- queue: 10 to 10,000 jobs wait in a separate queue for a worker that is not running, while other jobs go through the
  same gateway and Temporal. Measured are the cost as above, and the milliseconds of one job alone. Then the worker
  starts, and the waiting jobs are measured until all have ended. At the end the shortest queue is measured again, with
  everything that Temporal's store has kept meanwhile.
- tokens: a job generates 10 to 100,000 tokens as fast as the engine can, watched by one client. Measured are the
  processor time of the stack per token, above that of the job with the fewest tokens, and the events of history.

    python -m bench.growth
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from temporalio.client import Client

from bench.support import script
from bench.support.report import Report
from bench.support.stacks import models, new_stack, simulated
from bench.support.usage import cpu_of, since
from bench.support.watched_job import MODEL, finish, submit, together
from deploy.local.stack import Stack
from jobs.names import GPU_QUEUE
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 2
    jobs: int = 100
    workers: tuple[int, ...] = (1, 2, 4)
    waiting: tuple[int, ...] = (10, 100, 1000, 10_000)
    tokens: tuple[int, ...] = (10, 100, 1000, 10_000, 100_000)


AT_ONCE: Final = 32
CONTEXT: Final = 200_000
LATER: Final = "later"
"""The model whose worker starts later."""
LATER_QUEUE: Final = f"{GPU_QUEUE}.later"
FLAT: Final = 1.3
FAST: Final = simulated(tokens_per_second=1e9, context_tokens=CONTEXT)


@dataclass
class Running:
    """A running stack and its clients."""

    stack: Stack
    stub: LlmServiceStub
    temporal: Client

    async def cost(self, jobs: int) -> dict[str, float]:
        """Run watched jobs; return the cost of one, and the jobs per second."""
        before, begin = cpu_of(self.stack), time.monotonic()
        await together(jobs, lambda: run(self.stub), AT_ONCE)
        took = time.monotonic() - begin
        used = since(before, cpu_of(self.stack))
        return {"cpu_ms": sum(used.values()) / jobs * 1000, "jobs_per_second": jobs / took}


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "How does it grow?",
        "Processor time of the whole stack in ms per job, and in microseconds per token. Engine: simulated, no work."
        f" {AT_ONCE} concurrent jobs.",
    )
    for number in range(sizes.rounds):
        # The longest queue takes minutes to fill: once is enough.
        lengths = [length for length in sizes.waiting if number == 0 or length < max(sizes.waiting)]
        for workers in sizes.workers:
            async with running(workers, sizes) as stack:
                report.add(f"{workers} workers", "suite", await stack.cost(sizes.jobs))
                if workers == min(sizes.workers):
                    await measure_tokens(report, sizes, stack)
                    await measure_queues(report, sizes, stack, lengths)
    flat(report, [f"{workers} workers" for workers in sizes.workers], "cpu_ms")
    flat(report, [queue(waiting) for waiting in sizes.waiting], "cpu_ms")
    for shortest in (queue(min(sizes.waiting)), queue(min(sizes.waiting), again=True)):
        flat(report, [shortest, queue(max(sizes.waiting))], "drain_cpu_ms")
    flat(report, [f"{tokens} tokens" for tokens in sizes.tokens], "events")
    flat(report, [f"{tokens} tokens" for tokens in sizes.tokens if tokens > sizes.tokens[1]], "cpu_us_a_token")
    return report


def queue(waiting: int, *, again: bool = False) -> str:
    """Return the name of the case with `waiting` jobs. `again` marks the second time, after all longer queues."""
    return f"{waiting} waiting, after all" if again else f"{waiting} waiting"


def flat(report: Report, cases: list[str], figure: str) -> None:
    """Judge the ratio of the figure in the last case to that in the first. Skip rounds in which the first is zero."""
    pairs = zip(report.rounds(cases[-1], "suite", figure), report.rounds(cases[0], "suite", figure), strict=False)
    if ratios := [last / first for last, first in pairs if first]:
        report.judge(f"{figure}, {cases[-1]} / {cases[0]}", ratios, at_most=FLAT)


@asynccontextmanager
async def running(workers: int, sizes: Sizes) -> AsyncIterator[Running]:
    """Run a stack, and some jobs before the first measurement."""
    gateway = models((MODEL, GPU_QUEUE), (LATER, LATER_QUEUE), tokens=CONTEXT)
    with new_stack({"gateway": gateway, "gpu-worker": FAST}, workers=workers) as stack:
        async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            ready = Running(stack, LlmServiceStub(channel), await Client.connect(stack.address("temporal")))
            await ready.cost(sizes.jobs)
            yield ready


async def measure_tokens(report: Report, sizes: Sizes, running: Running) -> None:
    """Measure jobs with a growing number of tokens."""
    alone: dict[int, float] = {}
    for tokens in sizes.tokens:
        # A short job is too cheap to be measured alone.
        jobs = max(1, min(20, sizes.jobs, 20_000 // tokens))
        before = cpu_of(running.stack)
        for _ in range(jobs):
            ended = await run(running.stub, tokens)
        alone[tokens] = sum(since(before, cpu_of(running.stack)).values()) / jobs
        description = await running.temporal.get_workflow_handle(ended).describe()
        figures = {"cpu_ms": alone[tokens] * 1000, "events": float(description.history_length)}
        if tokens > sizes.tokens[0]:
            more = tokens - sizes.tokens[0]
            figures["cpu_us_a_token"] = max(0.0, alone[tokens] - alone[sizes.tokens[0]]) / more * 1e6
        report.add(f"{tokens} tokens", "suite", figures)


async def measure_queues(report: Report, sizes: Sizes, running: Running, lengths: list[int]) -> None:
    """Measure other jobs next to queues of growing length, then the jobs of each queue."""
    # The shortest queue again at the end: by then only the content of Temporal's store has grown.
    for case, waiting in [*((queue(n), n) for n in lengths), (queue(lengths[0], again=True), lengths[0])]:
        ids = await fill(running.stub, waiting)
        figures = await running.cost(sizes.jobs)
        begin = time.monotonic()
        await run(running.stub)
        figures["one_job_ms"] = (time.monotonic() - begin) * 1000
        worker = running.stack.add("gpu-worker", {"GPU_WORKER_MODEL": LATER, "GPU_WORKER_TASK_QUEUE": LATER_QUEUE})
        before, begin = cpu_of(running.stack), time.monotonic()
        await worker.start()
        await worker.wait_ready()
        before[worker.name] = cpu_of(running.stack)[worker.name]
        await asyncio.gather(*(running.temporal.get_workflow_handle(id_).result() for id_ in ids[-AT_ONCE:]))
        await drained(running.temporal)
        figures["drain_cpu_ms"] = sum(since(before, cpu_of(running.stack)).values()) / waiting * 1000
        figures["drain_jobs_per_second"] = waiting / (time.monotonic() - begin)
        await worker.terminate()
        report.add(case, "suite", figures)


async def fill(stub: LlmServiceStub, count: int) -> list[str]:
    """Submit jobs that wait; return their ids."""
    timeouts = llm_pb2.JobTimeouts(queue=Duration(seconds=3600))
    ids: list[str] = []

    async def one() -> None:
        ids.append(await submit(stub, model=LATER, tokens=1, timeouts=timeouts))

    await together(count, one, AT_ONCE)
    return ids


async def drained(temporal: Client) -> None:
    """Wait until no job runs."""
    async with asyncio.timeout(1200):
        while (await temporal.count_workflows("ExecutionStatus = 'Running'")).count:  # noqa: ASYNC110  # others count
            await asyncio.sleep(0.25)


async def run(stub: LlmServiceStub, tokens: int = 1) -> str:
    """Run a job to its end; return its id."""
    id_ = await submit(stub, tokens=tokens)
    await finish(stub, id_)
    return id_


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(1, 3, (1,), (2,), (10, 20, 40)), __doc__)
