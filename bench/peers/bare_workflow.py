"""A peer of several scripts: the smallest workflow with the steps of a job, remote activities one after another.

It is what a user of Temporal's SDK would write, except that its activities go through their task queue, like those of a
worker on another machine. Run in a process of its own: `python -m bench.peers.bare_workflow TEMPORAL_ADDRESS`
"""

import asyncio
import sys
import time
from datetime import timedelta
from typing import Final

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

QUEUE: Final = "bench-bare"


@activity.defn
async def note_time() -> int:
    """Return the time in nanoseconds, by the monotonic clock that all processes of this machine share."""
    return time.monotonic_ns()


@workflow.defn
class BareWorkflow:
    """Runs the activity several times."""

    @workflow.run
    async def run(self, activities: int) -> int:
        """Return the time at which the first activity ran."""
        first = await workflow.execute_activity(note_time, start_to_close_timeout=timedelta(minutes=1))
        for _ in range(activities - 1):
            await workflow.execute_activity(note_time, start_to_close_timeout=timedelta(minutes=1))
        return first


async def main(temporal: str) -> None:
    """Run the worker until killed."""
    client = await Client.connect(temporal)
    async with Worker(
        client,
        task_queue=QUEUE,
        workflows=[BareWorkflow],
        activities=[note_time],
        disable_eager_activity_execution=True,
    ):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
