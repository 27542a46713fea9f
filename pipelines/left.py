"""What a failed or cancelled step has used. Its workflow returns it with its error, or else is asked for it."""

import asyncio
from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.exceptions import ApplicationError, ChildWorkflowError, FailureError

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.usage import usage_of
    from llm_pb import batch_pb2, llm_pb2, pipeline_pb2

from workflows import activities
from workflows.ordered_activities import start_in_order

_ASKING: Final = timedelta(minutes=1)


async def left_by(child_id: str, error: ChildWorkflowError) -> pipeline_pb2.PipelineResult:
    """Return usage and counts of a child that has failed. Empty where nobody knows them.

    A child that was cancelled, or that Temporal has ended with its time, returns nothing. It is asked by an
    activity, which a cancel does not reach: what the step has used is known only then.
    """
    if isinstance(error.cause, ApplicationError):
        return _told(error.cause)
    if not workflow.patched(names.PATCH_LEFT_USAGE):
        return pipeline_pb2.PipelineResult()
    asking = start_in_order(
        activities.left_usage, child_id, schedule_to_close_timeout=_ASKING, start_to_close_timeout=_ASKING
    )
    while not asking.done():
        try:
            await workflow.wait_condition(asking.done)
        except asyncio.CancelledError:
            # The step ends as cancelled nevertheless: see failing_as().
            continue
    try:
        return asking.result()
    except FailureError:
        if not workflow.patched(names.PATCH_FAILED_ASKING):
            raise
        return pipeline_pb2.PipelineResult()


def _told(cause: ApplicationError) -> pipeline_pb2.PipelineResult:
    """Return usage and counts from the details of a child's error."""
    left = pipeline_pb2.PipelineResult()
    for detail in cause.details:
        if isinstance(detail, llm_pb2.JobResult):
            left.usage.CopyFrom(usage_of(detail.metadata))
        elif isinstance(detail, batch_pb2.BatchStatus | pipeline_pb2.PipelineResult):
            left.usage.CopyFrom(detail.usage)
            if detail.HasField("counts"):
                left.counts.CopyFrom(detail.counts)
    return left
