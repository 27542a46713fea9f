"""The peer of bench.cancel_latency: the smallest workflow with a cancellable activity, in a process of its own.

python -m bench.peers.cancel_peer TEMPORAL_ADDRESS
"""

import asyncio
import sys
import time
from datetime import timedelta
from typing import Final

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

QUEUE: Final = "bench-cancel"
_BEAT: Final = timedelta(seconds=1)


@activity.defn
async def wait() -> int:
    """Heartbeat until cancelled; return the time of the cancel, in nanoseconds since 1970."""
    try:
        while True:
            activity.heartbeat()
            await asyncio.sleep(_BEAT.total_seconds())
    except asyncio.CancelledError:
        return time.time_ns()


@workflow.defn
class WaitingWorkflow:
    """Runs the activity. When cancelled, it returns the activity's result."""

    @workflow.run
    async def run(self) -> int:
        """Return the result of wait()."""
        return await workflow.execute_activity(
            wait,
            start_to_close_timeout=timedelta(minutes=10),
            heartbeat_timeout=timedelta(seconds=30),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )


async def main(temporal: str) -> None:
    """Run the worker until killed, with the GPU worker's settings for heartbeats."""
    client = await Client.connect(temporal)
    async with Worker(
        client,
        task_queue=QUEUE,
        workflows=[WaitingWorkflow],
        activities=[wait],
        max_heartbeat_throttle_interval=_BEAT,
    ):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
