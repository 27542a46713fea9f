"""What steps that run report between two changes of their pipeline's tree.

These are the counts of batches, the progress of trainings, and whether an activity waits for a worker.

It is read from Temporal where somebody looks, so that it costs the pipeline no event.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Final

from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.client import WorkflowExecutionDescription
from temporalio.converter import DataConverter
from temporalio.service import RPCError

from encryption import KeysUnavailable
from jobs import names
from jobs.pipelines import ENDED_STEPS
from llm_pb import internal_pb2, pipeline_pb2
from payload_converter import PayloadError
from pipelines.training import TRAIN
from services.gateway.batches.reader import BatchReader
from services.gateway.errors import ApiError
from services.gateway.scopes import gateway_for

_log = logging.getLogger(__name__)
MAX_BATCHES: Final = 16
"""Maximum number of batches of a pipeline whose counts are read while they run, the oldest ones."""
_PATIENCE: Final = timedelta(seconds=2)
"""Maximum wait for the counts of a batch. One whose workflow is stuck would hold up the answer for 10 s."""
_MAX_KNOWN: Final = 1000
"""Maximum number of batches whose last counts are kept."""
Live = Mapping[int, pipeline_pb2.StepStatus]
"""What is known of steps that run, by the numbers of their nodes: messages without any other field."""


class LiveSteps:
    """Reads what steps report while they run."""

    def __init__(self, batches: BatchReader, converter: DataConverter, patience: timedelta = _PATIENCE) -> None:
        """`patience` is the maximum wait for the counts of a batch."""
        self._batches = batches
        self._converter = converter
        self._patience = patience.total_seconds()
        self._known: OrderedDict[str, pipeline_pb2.StepStatus] = OrderedDict()
        """The last counts of batches, by id."""

    async def read(self, description: WorkflowExecutionDescription, nodes: Iterable[internal_pb2.PipelineNode]) -> Live:
        """Return what the steps of a pipeline that was just described report.

        A batch that does not answer has its last counts. It is left out if none are known.
        """
        running = [node for node in nodes if is_live(node)]
        batches = [node for node in running if node.step.kind == pipeline_pb2.STEP_KIND_BATCH][:MAX_BATCHES]
        steps = await asyncio.gather(*(self._of_batch(node.step.workflow_id) for node in batches))
        found = {node.number: step for node, step in zip(batches, steps, strict=True) if step is not None}
        activities = [node for node in running if node.step.kind == pipeline_pb2.STEP_KIND_ACTIVITY]
        items = description.raw_description.pending_activities if activities else ()
        # Both are in the order in which they began. Where their numbers differ, it is not known which belong together.
        pending = sorted(items, key=lambda item: (len(item.activity_id), item.activity_id))
        for node, item in zip(activities, pending, strict=True) if len(activities) == len(pending) else ():
            # An earlier one is of a step that has ended since.
            if item.scheduled_time.ToNanoseconds() >= node.step.start_time.ToNanoseconds():
                found[node.number] = await self._of_activity(description.id, node, item)
        return found

    async def _of_batch(self, batch_id: str) -> pipeline_pb2.StepStatus | None:
        try:
            async with asyncio.timeout(self._patience):
                status = await self._batches.status(gateway_for(batch_id), batch_id)
        except (ApiError, RPCError, PayloadError, KeysUnavailable, TimeoutError) as error:
            _log.info("%s tells no counts: %r", batch_id, error)
            return self._known.get(batch_id)
        if not status.counts.total:
            return None
        step = pipeline_pb2.StepStatus(counts=status.counts)
        self._known[batch_id] = step
        self._known.move_to_end(batch_id)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return step

    async def _of_activity(
        self, pipeline_id: str, node: internal_pb2.PipelineNode, pending: PendingActivityInfo
    ) -> pipeline_pb2.StepStatus:
        waits = pending.state == PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED
        # The time of an attempt that has failed is that of the next one.
        step = pipeline_pb2.StepStatus(queued=waits and pending.scheduled_time.ToNanoseconds() <= time.time_ns())
        beats = pending.heartbeat_details.payloads
        if pending.activity_type.name == names.ACTIVITY_TRAIN_MODEL and node.step.path == TRAIN and beats:
            try:
                beat, *_ = await self._converter.decode(beats, [internal_pb2.TrainingHeartbeat])
            except (PayloadError, KeysUnavailable) as error:
                _log.info("%s tells no progress: %r", pipeline_id, error)
                return step
            step.training.step, step.training.steps = beat.step, beat.steps
            step.training.loss, step.training.tokens_per_second = beat.loss, beat.tokens_per_second
            step.training.checkpoint_step = beat.checkpoint_step
        return step


def is_live(node: internal_pb2.PipelineNode) -> bool:
    """Return whether a step runs and reports something meanwhile."""
    step = node.step
    if step.state in ENDED_STEPS:
        return False
    if step.kind == pipeline_pb2.STEP_KIND_BATCH:
        return bool(step.workflow_id)
    return step.kind == pipeline_pb2.STEP_KIND_ACTIVITY


def with_live(node: internal_pb2.PipelineNode, live: Live) -> pipeline_pb2.StepStatus:
    """Return the step of a node with what it reports."""
    if (more := live.get(node.number)) is None or node.step.state in ENDED_STEPS:
        return node.step
    step = pipeline_pb2.StepStatus()
    step.CopyFrom(node.step)
    step.MergeFrom(more)
    return step
