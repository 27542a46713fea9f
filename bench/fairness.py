"""Whether users take turns: how long a user with few jobs waits behind a user with many.

A worker has four slots, and a job takes 0.2 seconds. One user's jobs wait in the queue when another user submits a few.
The script measures the time from the first of these submissions to the end of the last of these jobs. When users take
turns, the second user gets half of the worker, so twice the time of an idle stack is the optimum.

The same run measures the same jobs in an idle stack, and with fairness off in Temporal (matching.enableFairness), where
the second user waits for all jobs of the first one. Each has its own stack.

    python -m bench.fairness
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration

from bench.support import script
from bench.support.report import Report
from bench.support.stacks import new_stack, simulated
from bench.support.watched_job import finish, submit, together
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 3
    many: int = 1000
    few: int = 10


SLOTS: Final = 4
JOB_SECONDS: Final = 0.2
FAIRNESS: Final = "matching.enableFairness="
SUBMITTING: Final = 32
"""Concurrent calls of Submit."""


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "Is it fair?",
        f"Seconds from the first of {sizes.few} submissions to the end of the last job, in a stack without other work"
        f" (alone) or with {sizes.many} jobs of another user. {SLOTS} slots, a job takes {JOB_SECONDS} s.",
    )
    case = f"{sizes.few} jobs behind {sizes.many}"
    for _ in range(sizes.rounds):
        for who, fair in (("suite", True), ("peer_fairness_off", False)):
            alone, behind = await waits(sizes, fair=fair)
            report.add(case, who, {"seconds": behind})
            if fair:
                report.add(case, "limit_alone", {"seconds": alone})
    report.ratio(case, "seconds", "limit_alone", at_most=2)
    report.ratio(case, "seconds", "peer_fairness_off")
    return report


async def waits(sizes: Sizes, *, fair: bool) -> tuple[float, float]:
    """Return the seconds that the few jobs take alone and behind the many."""
    engine = simulated(tokens_per_second=1e9, prefill_seconds=JOB_SECONDS)
    with new_stack({"gpu-worker": engine | {"GPU_WORKER_MAX_CONCURRENT": str(SLOTS)}}) as stack:
        temporal = stack.processes["temporal"]
        if not fair:
            temporal.command = tuple(
                f"{FAIRNESS}false" if word.startswith(FAIRNESS) else word for word in temporal.command
            )
        async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            stub = LlmServiceStub(channel)
            await few(stub, 1)
            alone = await few(stub, sizes.few)
            worker = stack.processes["gpu-worker"]
            await worker.terminate()
            await fill(stub, sizes.many)
            await worker.start()
            await worker.wait_ready()
            return alone, await few(stub, sizes.few)


async def few(stub: LlmServiceStub, count: int) -> float:
    """Run the second user's jobs; return the seconds that they take."""
    begin = time.monotonic()
    await asyncio.gather(*[one_of(stub, "few") for _ in range(count)])
    return time.monotonic() - begin


async def one_of(stub: LlmServiceStub, user: str) -> None:
    """Run a job to its end."""
    await finish(stub, await submit_for(stub, user))


async def submit_for(stub: LlmServiceStub, user: str) -> str:
    """Submit a job of the user that may wait for an hour."""
    timeouts = llm_pb2.JobTimeouts(queue=Duration(seconds=3600))
    return await submit(stub, user_id=user, tokens=1, timeouts=timeouts)


async def fill(stub: LlmServiceStub, count: int) -> None:
    """Submit the first user's jobs."""
    await together(count, lambda: submit_for(stub, "many"), SUBMITTING)


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, many=20, few=4), __doc__)
