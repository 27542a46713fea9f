"""What steps of a pipeline report while they run."""

import asyncio
from datetime import timedelta
from typing import Any, cast

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
    patience = timedelta(milliseconds=50)
    about = (cast("WorkflowExecutionDescription", None), pipeline_pb2.PipelineStatus(), [NODE])
    live, other = (LiveSteps(cast("BatchReader", batches), data_converter, patience) for _ in range(2))
    counts = (await live.read(*about))[1].counts
    assert (counts.total, counts.succeeded) == (9, 4)
    batches.stuck.set()
    async with asyncio.timeout(5):
        assert (await live.read(*about))[1].counts == counts
        assert await other.read(*about) == {}, "it knows none"
