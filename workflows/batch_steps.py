"""The steps of a batch that take a core of a gateway for minutes: its lines are planned, its results merged.

They have a task queue of their own: where they wait for their turn, no other activity waits.
"""

from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from jobs import batches, names
    from llm_pb import internal_pb2

from workflows import activities
from workflows.running_chunks import STEP_RETRIES

_TIMEOUT: Final = timedelta(hours=6)
"""Maximum duration of an attempt. One whose process was killed is tried again much earlier."""
_HEARTBEAT: Final = timedelta(seconds=30)


def start_plan(
    run: internal_pb2.BatchRun, batch_id: str, tenant: str
) -> workflow.ActivityHandle[internal_pb2.BatchPlan]:
    """Start to plan a batch. A cancel waits until the step has noticed it."""
    return workflow.start_activity(
        activities.plan_batch,
        internal_pb2.PlanRequest(
            batch_id=batch_id, batch=run.batch, tenant=tenant, limits=run.options.limits, scopes=run.options.scopes
        ),
        task_queue=_queue(),
        start_to_close_timeout=_TIMEOUT,
        heartbeat_timeout=_HEARTBEAT,
        retry_policy=STEP_RETRIES,
        cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
    )


async def merge(request: internal_pb2.MergeRequest) -> internal_pb2.MergeResult:
    """Return the output and the errors of a batch. Raises ActivityError."""
    return await workflow.execute_activity(
        activities.merge_batch,
        request,
        task_queue=_queue(),
        start_to_close_timeout=_TIMEOUT,
        heartbeat_timeout=_HEARTBEAT,
        retry_policy=STEP_RETRIES,
    )


def stop_of(error: ActivityError, otherwise: str) -> batches.Stop:
    """Return the stop of a batch for which a step has failed. `otherwise` is the reason of a step that gives none."""
    cause = error.cause if isinstance(error.cause, ApplicationError) else None
    return batches.stop_failed((cause.type if cause else None) or otherwise, cause.message if cause else str(error))


def _queue() -> str:
    return f"{workflow.info().task_queue}{names.BATCH_STEPS_QUEUE_SUFFIX}"
