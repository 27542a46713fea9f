"""The live tree of a pipeline: its changes, for those who follow it."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from llm_pb import internal_pb2, pipeline_pb2

from pipelines.tree import Tree
from workflows import activities

_PUBLISH_EVERY: Final = timedelta(milliseconds=250)
_NODES_EVERY: Final = 250
"""Number of nodes up to which a tree is published so often. Each time costs the pipeline some events."""
_TURNS: Final = 20
"""More conditions than a step waits for, one after the other, before it makes its command."""
_LOCAL: Final = timedelta(seconds=10)
_ONCE: Final = RetryPolicy(maximum_attempts=1)


async def publish_tree(tree: Tree, status: pipeline_pb2.PipelineStatus, has_ended: Callable[[], bool]) -> None:
    """Publish the tree and the status whenever they have changed, until the pipeline has ended.

    A change does not wait for one before that takes long.
    """
    published, last = 0, workflow.now() - _PUBLISH_EVERY
    # With local activities and late workflow tasks the time of a run differed from that of its replay once. So no
    # command may depend on it.
    paced = workflow.patched(names.PATCH_PACED)
    # A replay may get the ends of two local activities at once that came one after the other, if a query was answered
    # meanwhile. So no command may follow from the end of this one.
    at_once = workflow.patched(names.PATCH_PACED_AT_ONCE)
    ordered = workflow.patched(names.PATCH_ORDERED)
    # A replay may get the end of a pause with what came later. So it must not decide which command comes first.
    comes_last = workflow.patched(names.PATCH_PUBLISHES_LAST)
    publishing: workflow.ActivityHandle[None] | None = None

    def changed() -> bool:
        return tree.version > published or has_ended()

    while True:
        await workflow.wait_condition(changed)
        if comes_last:
            await _let_others_go_on()
        if has_ended():
            if ordered and publishing is not None:
                # The feed is forgotten after it.
                await workflow.wait_condition(publishing.done)
            return
        if not paced and (early := last + _PUBLISH_EVERY - workflow.now()) > timedelta(0):
            await workflow.sleep(early)
        nodes = tree.changed_since(published)
        record = internal_pb2.PipelineRecord(status=status, nodes=nodes, version=tree.version)
        change = internal_pb2.PipelineChange(since=published, record=record)
        published, last = tree.version, workflow.now()
        publishing = workflow.start_local_activity(
            activities.publish_pipeline, change, start_to_close_timeout=_LOCAL, retry_policy=_ONCE
        )
        pause = asyncio.create_task(workflow.sleep(_pause(len(tree.nodes)))) if at_once else None
        # A reader that misses it asks Temporal.
        publishing.add_done_callback(lambda done: done.cancelled() or done.exception())
        if not ordered:
            await workflow.wait_condition(publishing.done)
        if pause is not None:
            await _until(pause, has_ended)
        elif paced:
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(has_ended, timeout=_pause(len(tree.nodes)))


async def _let_others_go_on() -> None:
    """Return when the code of the pipeline has done what it can do in this workflow task."""
    for _ in range(_TURNS):
        # Conditions are looked at when nothing else can go on.
        await workflow.wait_condition(lambda: True)


async def _until(pause: "asyncio.Task[None]", has_ended: Callable[[], bool]) -> None:
    """Return once the pause is over, or the pipeline has ended."""
    await workflow.wait_condition(lambda: pause.done() or has_ended())
    pause.cancel()


def _pause(nodes: int) -> timedelta:
    """Return the time until a tree of so many nodes is published again. A replay takes no notice of it."""
    return _PUBLISH_EVERY * max(1, nodes / _NODES_EVERY)
