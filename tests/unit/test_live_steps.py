"""What steps of a pipeline report while they run."""

import asyncio
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
from temporalio.client import WorkflowExecutionDescription

from llm_pb import batch_pb2, internal_pb2, pipeline_pb2
from payload_converter import data_converter
from services.gateway.batches.reader import BatchReader
from services.gateway.pipelines.live import LiveSteps

NODE = internal_pb2.PipelineNode(
    number=1,
    step=pipeline_pb2.StepStatus(
        kind=pipeline_pb2.STEP_KIND_BATCH, state=pipeline_pb2.STEP_STATE_RUNNING, workflow_id="llmbatch-u-1"
    ),
)


class Batches:
    """A batch that answers until it is stuck."""

    def __init__(self) -> None:
        self.stuck = asyncio.Event()

    async def status(self, *_: Any) -> batch_pb2.BatchStatus:
        if self.stuck.is_set():
            await asyncio.Event().wait()
        return batch_pb2.BatchStatus(counts={"total": 9, "succeeded": 4})


async def test_a_batch_that_is_stuck_has_its_last_counts() -> None:
    batches = Batches()
    # The counts of a batch that answers at once are taken, however short the time is.
    patience = timedelta(0)
    about = (cast("WorkflowExecutionDescription", None), [NODE])
    live, other = (LiveSteps(cast("BatchReader", batches), data_converter, patience) for _ in range(2))
    counts = (await live.read(*about))[1].counts
    assert (counts.total, counts.succeeded) == (9, 4)
    batches.stuck.set()
    assert (await live.read(*about))[1].counts == counts
    assert await other.read(*about) == {}, "it knows none"


async def test_each_activity_tells_whether_it_waits_for_a_worker() -> None:
    """Temporal lists them in any order."""
    raw = DescribeWorkflowExecutionResponse()
    for id_, state in (("10", "STARTED"), ("9", "SCHEDULED")):
        raw.pending_activities.add(activity_id=id_, state=PendingActivityState.Value(f"PENDING_ACTIVITY_STATE_{state}"))
    running = {"kind": pipeline_pb2.STEP_KIND_ACTIVITY, "state": pipeline_pb2.STEP_STATE_RUNNING}
    nodes = [internal_pb2.PipelineNode(number=number, step=running) for number in (4, 7)]
    description = cast("WorkflowExecutionDescription", SimpleNamespace(id="llmpipe-u-1", raw_description=raw))
    live = LiveSteps(cast("BatchReader", Batches()), data_converter)
    assert {number: step.queued for number, step in (await live.read(description, nodes)).items()} == {
        4: True,
        7: False,
    }
    # One that is no step, or a step whose activity is not there yet: which is which is not known.
    assert await live.read(description, nodes[:1]) == {}
