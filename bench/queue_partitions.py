"""How a thousand GPU workers share a queue: whose turn it is with many partitions, how long a job waits, and the polls.

Temporal spreads a task queue over partitions, each of which one server serves, and in each of which users take turns
for themselves. So partitions are what a queue grows by, and what may blur fairness.

- `suite`: a real stack with a real queue, of as many partitions, in which one user's jobs wait when another submits a
  few. The figure is that of bench.fairness: the seconds until the few have ended.
- `simulated`: the same queue in a simulation, without the time that Temporal needs to give a job out. That the two
  agree but for this time is what the simulation's other figures rest on.
- A thousand workers: the simulation alone. `last` is the time until the last of a user's ten jobs starts, behind
  100,000 jobs of another. `p99` is the wait of jobs that come by chance, where the same seats are shared by one queue
  or are divided among many, as a queue for each class, tenant or worker would.
- Polls: as many idle polls as some hundreds of workers keep open at a real frontend of Temporal: those that it
  refuses, and its memory for each.

    python -m bench.queue_partitions
"""

import asyncio
import random
import statistics
from dataclasses import dataclass
from typing import Any, Final

import grpc
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import PollActivityTaskQueueRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from bench.fairness import SLOTS, few, fill
from bench.support import script
from bench.support.report import Report, quantiles
from bench.support.stacks import new_stack, simulated
from bench.support.turns import seconds_behind, waits_of_arrivals
from bench.support.usage import resident_bytes
from deploy.local.stack import Stack
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line. `polls` is the number of idle polls, `arrivals` that of simulated jobs."""

    rounds: int = 3
    real: tuple[int, ...] = (1, 4)
    many: int = 60
    few: int = 10
    job_seconds: float = 2
    partitions: tuple[int, ...] = (1, 4, 16, 64, 256)
    queues: tuple[int, ...] = (1, 10, 100, 1000)
    arrivals: int = 400_000
    polls: tuple[int, ...] = (500, 1000, 1500)


WORKERS: Final = 1000
SEATS: Final = 16
"""Of a worker, by default."""
LONG_SECONDS: Final = 20.0
BACKLOG: Final = 100_000
LOAD: Final = 0.95
SIMULATIONS: Final = 20
"""Number of simulations of the small queue in a round."""
PARTITIONS: Final = "matching.numTaskqueue{}Partitions=1"
SETTLE_SECONDS: Final = 2.0
OPENED_PER_SECOND: Final = 100
"""Polls that a busy machine opens at least."""


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "How do a thousand workers share a queue?",
        f"Seconds. {sizes.few} jobs of a user behind {sizes.many} of another: {SLOTS} seats, jobs of"
        f" {sizes.job_seconds:g} s, from the first submission to the last end. {WORKERS} workers of {SEATS} seats,"
        f" jobs of {LONG_SECONDS:g} s: from submission to start, simulated; at a load of {LOAD:.0%} where jobs come by"
        " chance. Idle polls: how many Temporal's frontend refuses with its default settings, and the server's memory"
        " for each.",
    )
    for number in range(sizes.rounds):
        chance = random.Random(number)
        for partitions in sizes.real:
            case = f"{sizes.few} jobs behind {sizes.many}, {partitions} partitions"
            last = partitions == sizes.real[-1]
            report.add(case, "suite", {"seconds": await behind(sizes, partitions, report if last else None)})
            report.add(case, "simulated", {"seconds": behind_simulated(sizes, partitions, chance)})
        for partitions in sizes.partitions:
            waits = list(
                seconds_behind(
                    partitions=partitions,
                    seats=WORKERS * SEATS,
                    job_seconds=LONG_SECONDS,
                    many=BACKLOG,
                    few=10,
                    chance=chance,
                )
            )
            report.add(f"{WORKERS} workers, {partitions} partitions", "simulated", {"last": waits[-1]})
        for queues in sizes.queues:
            arrivals = waits_of_arrivals(
                queues=queues,
                seats=WORKERS * SEATS,
                job_seconds=LONG_SECONDS,
                load=LOAD,
                jobs=sizes.arrivals,
                chance=chance,
            )
            report.add(f"{WORKERS} workers, {queues} queues", "simulated", quantiles(list(arrivals)))
    for partitions in sizes.real:
        case = f"{sizes.few} jobs behind {sizes.many}, {partitions} partitions"
        report.ratio(case, "seconds", "simulated")
    return report


async def behind(sizes: Sizes, partitions: int, polls: Report | None) -> float:
    """Return the seconds that the few jobs take in a real queue. With a report, add the costs of polls to it."""
    engine = simulated(tokens_per_second=1e9, prefill_seconds=sizes.job_seconds)
    with new_stack({"gpu-worker": engine | {"GPU_WORKER_MAX_CONCURRENT": str(SLOTS)}}) as stack:
        temporal, worker = stack.processes["temporal"], stack.processes["gpu-worker"]
        changed = {PARTITIONS.format(kind): f"{PARTITIONS.format(kind)[:-1]}{partitions}" for kind in ("Read", "Write")}
        temporal.command = tuple(changed.get(word, word) for word in temporal.command)
        async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            stub = LlmServiceStub(channel)
            await few(stub, 1)
            await worker.terminate()
            await fill(stub, sizes.many)
            await worker.start()
            await worker.wait_ready()
            seconds = await few(stub, sizes.few)
            await worker.terminate()
            if polls is not None:
                for count in sizes.polls:
                    polls.add(f"{count} idle polls", "suite", await idle(stack, count))
            return seconds


def behind_simulated(sizes: Sizes, partitions: int, chance: random.Random) -> float:
    """Return the mean of the seconds until the last of the few jobs has ended in a simulated queue."""
    ends = [
        sizes.job_seconds
        + list(
            seconds_behind(
                partitions=partitions,
                seats=SLOTS,
                job_seconds=sizes.job_seconds,
                many=sizes.many,
                few=sizes.few,
                chance=chance,
            )
        )[-1]
        for _ in range(SIMULATIONS)
    ]
    return statistics.mean(ends)


async def idle(stack: Stack, count: int) -> dict[str, float]:
    """Open polls of a queue without tasks; return how many Temporal refuses, and the memory of each that it keeps."""
    client, pid = await Client.connect(stack.address("temporal")), stack.processes["temporal"].pid
    assert pid is not None
    before = resident_bytes(pid)
    polls: list[asyncio.Task[Any]] = [asyncio.create_task(_poll(client, number)) for number in range(count)]
    await asyncio.sleep(SETTLE_SECONDS + count / OPENED_PER_SECOND)
    refused = sum(poll.done() for poll in polls)
    kilobytes = max(0, resident_bytes(pid) - before) / 1000 / max(1, count - refused)
    for poll in polls:
        poll.cancel()
    errors = [error for error in await asyncio.gather(*polls, return_exceptions=True) if isinstance(error, RPCError)]
    if unexpected := [error for error in errors if error.status is not RPCStatusCode.RESOURCE_EXHAUSTED]:
        raise unexpected[0]
    return {"refused": refused, "kilobytes": kilobytes}


async def _poll(client: Client, number: int) -> object:
    request = PollActivityTaskQueueRequest(
        namespace=client.namespace, task_queue=TaskQueue(name="idle"), identity=f"idle-{number}"
    )
    return await client.workflow_service.poll_activity_task_queue(request)


if __name__ == "__main__":
    quick = Sizes(
        rounds=1,
        real=(2,),
        many=8,
        few=2,
        job_seconds=0.2,
        partitions=(1, 4),
        queues=(1, 10),
        arrivals=4000,
        polls=(10,),
    )
    script.run(measure, Sizes(), quick, __doc__)
