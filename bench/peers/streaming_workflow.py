"""A peer of several scripts, Temporal's Workflow Streams: a workflow hosts a stream, and its activity generates tokens.

bench.peers.stamp_sources runs the worker.
"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, Final

from temporalio import workflow
from temporalio.client import Client, WorkflowHandle
from temporalio.contrib.workflow_streams import WorkflowStream, WorkflowStreamClient

with workflow.unsafe.imports_passed_through():
    from bench.support.stamps import Read, read_stamps

TOPIC: Final = "tokens"
MAKE_TOKENS: Final = "MakeTokens"
QUEUE: Final = "bench-streams"
END_SECONDS: Final = 5
_ids = count(1)


@dataclass(frozen=True)
class Setup:
    """Settings of a stream: seconds between two batches, maximum tokens of a batch, seconds between two polls."""

    batch_interval: float
    max_batch_size: int | None
    poll_cooldown: float


AS_IN_ITS_SAMPLE: Final = Setup(batch_interval=0.2, max_batch_size=None, poll_cooldown=0.1)
"""The settings of Temporal's own sample for LLMs."""
FASTEST: Final = Setup(batch_interval=0.001, max_batch_size=1, poll_cooldown=0)
"""Each token is sent immediately, and there is no pause between polls."""


@dataclass(frozen=True)
class Asked:
    """The tokens that the activity publishes."""

    tokens: int
    per_second: float
    setup: Setup


@workflow.defn
class StreamingWorkflow:
    """Runs the activity and keeps what it publishes for subscribers."""

    @workflow.init
    def __init__(self, asked: Asked) -> None:
        self._stream = WorkflowStream()

    @workflow.run
    async def run(self, asked: Asked) -> None:
        """Run the activity until it has published all tokens."""
        await workflow.execute_activity(MAKE_TOKENS, asked, start_to_close_timeout=timedelta(minutes=10))


async def start_stream(client: Client, tokens: int, per_second: float, setup: Setup) -> WorkflowHandle[Any, Any]:
    """Start a workflow with a new stream."""
    asked = Asked(tokens, per_second, setup)
    return await client.start_workflow(StreamingWorkflow.run, asked, id=f"bench-stream-{next(_ids)}", task_queue=QUEUE)


async def read_stream(client: Client, handle: WorkflowHandle[Any, Any], tokens: int, setup: Setup) -> list[Read]:
    """Subscribe, and return the stamps of `tokens` tokens."""
    stamps: list[Read] = []
    items = WorkflowStreamClient.create(client, handle.id).subscribe(
        [TOPIC], result_type=str, poll_cooldown=timedelta(seconds=setup.poll_cooldown)
    )
    async for item in items:
        stamps += read_stamps(item.data)
        if len(stamps) == tokens:
            break
    return stamps


async def end_stream(handle: WorkflowHandle[Any, Any]) -> None:
    """Wait until the workflow has ended; terminate it if it does not end in time.

    With the fastest settings one in eight does not end: its activity hangs in the SDK's own flush after the last token
    (temporalio 1.35 on Python 3.11). All tokens have been read by then.
    """
    try:
        async with asyncio.timeout(END_SECONDS):
            await handle.result()
    except TimeoutError:
        await handle.terminate()
