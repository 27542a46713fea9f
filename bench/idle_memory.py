"""Idle memory of the gateway and the notifier, in MB of resident set.

The script measures the running stack before any job and after a hundred jobs. The peer is a Python process that only is
connected to the same Temporal server and polls it: the cost of the SDK by itself. The floor is bare Python.

    python -m bench.idle_memory
"""

import asyncio
import sys
from dataclasses import dataclass

import grpc

from bench.support import script
from bench.support.report import Report
from bench.support.stacks import new_stack, simulated
from bench.support.usage import resident_bytes
from bench.support.watched_job import finish, submit, together
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 3
    jobs: int = 100


AIM_MB = {"gateway": 150, "notifier": 110}
PEER = """
import asyncio, sys
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

@activity.defn
async def nothing() -> None: ...

async def main():
    client = await Client.connect(sys.argv[1])
    async with Worker(client, task_queue="peer", activities=[nothing]):
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
FLOOR = "print('ready', flush=True); input()"


async def measure(sizes: Sizes) -> Report:
    """Return the report. Each round has its own stack."""
    report = Report("How much memory does an idle stack take?", "MB resident, before any job and after some jobs.")
    after = f"after {sizes.jobs} jobs"
    for _ in range(sizes.rounds):
        with new_stack({"gpu-worker": simulated(tokens_per_second=1000)}) as stack:
            async with stack:
                pids = {name: stack.processes[name].pid or 0 for name in AIM_MB}
                for name, pid in pids.items():
                    report.add("idle", name, {"megabytes": megabytes(pid)})
                await run_jobs(stack.address("gateway"), sizes.jobs)
                for name, pid in pids.items():
                    report.add(after, name, {"megabytes": megabytes(pid)})
                peer, floor = await memory_of(PEER, stack.address("temporal")), await memory_of(FLOOR)
                report.add("idle", "peer_bare_temporal_worker", {"megabytes": peer})
                report.add("idle", "floor_bare_python", {"megabytes": floor})
    for name, most in AIM_MB.items():
        report.ratio("idle", "megabytes", "peer_bare_temporal_worker", who=name)
        report.judge(f"MB, {name}, idle", report.rounds("idle", name, "megabytes"), at_most=most)
    return report


def megabytes(pid: int) -> float:
    """Return a process's resident set in 10^6 bytes."""
    return resident_bytes(pid) / 1e6


async def run_jobs(address: str, count: int) -> None:
    """Run all jobs concurrently to their ends."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = LlmServiceStub(channel)

        async def one() -> None:
            await finish(stub, await submit(stub, tokens=20))

        await together(count, one, count)


async def memory_of(code: str, *arguments: str) -> float:
    """Return the memory, in MB, of a process that runs the code and has reported that it is ready."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            await process.stdout.readline()
        return megabytes(process.pid)
    finally:
        process.kill()
        await process.wait()


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, jobs=3), __doc__)
