"""Peers of pipeline_steps and pipeline_cancel: the smallest parent workflows with a child workflow for each step.

Steps run one remote activity, or wait for a timer until they are cancelled. It is what a user of Temporal's SDK would
write by hand for the same program, without tree, stream and budget.
Run in a process of its own: `python -m bench.peers.bare_children TEMPORAL_ADDRESS`
"""

import asyncio
import sys
from datetime import timedelta
from typing import Final

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

QUEUE: Final = "bench-bare-children"


@activity.defn
async def generate() -> str:
    """Return one token."""
    return "token"


@workflow.defn
class BareChild:
    """One step."""

    @workflow.run
    async def run(self) -> str:
        """Return what the activity returns."""
        return await workflow.execute_activity(generate, start_to_close_timeout=timedelta(minutes=1))


@workflow.defn
class BareParent:
    """Runs its steps one after another, or all at the same time."""

    @workflow.run
    async def run(self, steps: int, at_once: bool) -> int:  # an argument of a workflow
        """Return the number of steps."""
        own = workflow.info().workflow_id

        async def step(number: int) -> None:
            await workflow.execute_child_workflow(BareChild.run, id=f"{own}/{number}")

        if at_once:
            await asyncio.gather(*map(step, range(steps)))
        else:
            for number in range(steps):
                await step(number)
        return steps


@workflow.defn
class WaitingChild:
    """One step that waits."""

    @workflow.run
    async def run(self) -> None:
        """Wait for an hour."""
        await workflow.sleep(timedelta(hours=1))


@workflow.defn
class WaitingParent:
    """Runs steps that wait, all at the same time."""

    @workflow.run
    async def run(self, steps: int) -> None:
        """Wait for the steps. A cancel reaches all of them, and this waits until they have ended."""
        own = workflow.info().workflow_id
        await asyncio.gather(
            *(workflow.execute_child_workflow(WaitingChild.run, id=f"{own}/{number}") for number in range(steps))
        )


async def main(temporal: str) -> None:
    """Run the worker until killed."""
    client = await Client.connect(temporal)
    async with Worker(
        client,
        task_queue=QUEUE,
        workflows=[BareParent, BareChild, WaitingParent, WaitingChild],
        activities=[generate],
        disable_eager_activity_execution=True,
        # The suite's worker has none either.
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
