"""The close of a workflow, and the publication of its outcome, which is read after the close."""

from collections.abc import Sequence
from datetime import UTC, timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import SearchAttributeUpdate
from temporalio.exceptions import CancelledError

with workflow.unsafe.imports_passed_through():
    from google.protobuf.message import Message

    from jobs import errors, ids, names
    from jobs.application_errors import to_application_error
    from jobs.memo import to_memo
    from jobs.search import attributes_of
    from jobs.times import TotalTime
    from jobs.usage import usage_of
    from llm_pb import llm_pb2

from workflows.cancellation import Cancellation


def attributes(job: llm_pb2.JobRequest) -> list[SearchAttributeUpdate[Any]]:
    """Return the search attributes that a gateway sets for the job. They are in clear."""
    tenant = ids.tenant_of(workflow.info().workflow_id)
    return [pair.key.value_set(pair.value) for pair in attributes_of(job, tenant)]


def publish(status: llm_pb2.JobStatus, result: Message | None, more: Sequence[SearchAttributeUpdate[Any]] = ()) -> None:
    """Write the final status into search attributes and memo, together with `more` search attributes.

    Call it just before the workflow closes, so that it is a part of the workflow's last task. A task of its own would
    cost Temporal a third of a whole job.
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
    stored = llm_pb2.JobStatus()
    stored.CopyFrom(status)
    # Readers take the class from the search attribute. Version 0.1.0 refuses a memo with a field that it does not know.
    stored.ClearField("job_class")
    memo: dict[str, Any] = {names.MEMO_STATUS: to_memo(stored), names.MEMO_RESULT_BYTES: size}
    if isinstance(result, llm_pb2.JobResult) and result.metadata.HasField("cost_micros"):
        memo[names.MEMO_COST_MICROS] = result.metadata.cost_micros
    lost = status.state in (llm_pb2.JOB_STATE_CANCELLED, llm_pb2.JOB_STATE_TIMED_OUT)
    if lost and isinstance(result, llm_pb2.JobResult) and workflow.info().parent is not None:
        memo[names.MEMO_USAGE] = to_memo(usage_of(result.metadata))
    workflow.upsert_memo(memo)


async def raise_failure(
    error: errors.JobError, partial: Message | None, cancellation: Cancellation, total_time: TotalTime
) -> None:
    """Close the workflow with the error and the partial result: see the table in workflows.llm_job.

    Raises CancelledError, for which Temporal must have been asked to cancel, or ApplicationError. Waits for Temporal to
    end the workflow if its total time is spent, unless its parent has told it not to.
    """
    if isinstance(error, errors.Cancelled):
        raise CancelledError(str(error))
    waits = total_time.ends_workflow and not workflow.memo_value(names.MEMO_CLOSES_ITSELF, False)
    if isinstance(error, errors.TotalTimeout) and waits:
        await cancellation.wait(lambda: False)
    raise to_application_error(error, *([] if partial is None else [partial]))
