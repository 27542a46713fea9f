"""How the outcome of a workflow gets to where it is read once the workflow has closed, and how the workflow closes."""

from collections.abc import Sequence
from datetime import UTC, timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import SearchAttributeUpdate
from temporalio.exceptions import CancelledError

with workflow.unsafe.imports_passed_through():
    from google.protobuf.message import Message

    from jobs import errors, names
    from jobs.memo import to_memo
    from jobs.times import TotalTime
    from llm_pb import llm_pb2

from workflows.cancellation import Cancellation


def publish(status: llm_pb2.JobStatus, result: Message | None, more: Sequence[SearchAttributeUpdate[Any]] = ()) -> None:
    """Write the final status into search attributes and memo, and `more` search attributes along with it.

    To be called just before the workflow closes: then it is a part of the workflow's last task. A task of its own would
    cost Temporal a third of what a whole job does.
    """
    latency = status.end_time.ToDatetime(UTC) - workflow.info().workflow_start_time
    workflow.upsert_search_attributes(
        [
            names.JOB_STATE.value_set(llm_pb2.JobState.Name(status.state)),
            names.LATENCY_MS.value_set(latency // timedelta(milliseconds=1)),
            *more,
        ]
    )
    size = 0 if result is None else result.ByteSize()
    workflow.upsert_memo({names.MEMO_STATUS: to_memo(status), names.MEMO_RESULT_BYTES: size})


async def raise_failure(
    error: errors.JobError, partial: Message | None, cancellation: Cancellation, total_time: TotalTime
) -> None:
    """Close the workflow with the error and what was generated before it: see the table in workflows.llm_job.

    Raises CancelledError, for which Temporal has to have been asked to cancel; ApplicationError. Waits for Temporal to
    end the workflow where its total time is spent.
    """
    if isinstance(error, errors.Cancelled):
        raise CancelledError(str(error))
    if isinstance(error, errors.TotalTimeout) and total_time.ends_workflow:
        await cancellation.wait(lambda: False)
    raise errors.to_application_error(error, *([] if partial is None else [partial]))
