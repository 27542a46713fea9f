"""What a workflow measures when its job's outcome is settled; the one place where finished jobs are counted.

The workflow counts, because it alone sees every outcome, whatever died on the way, and because Temporal's meter is safe
under replay: a workflow that goes on in another process counts nothing again. What stays: a job that an operator
terminated is not counted, because its code runs no more (Temporal's server counts it); a process that dies before it is
scraped takes its last counts along; a workflow task that ran and was then lost (it failed or timed out, or Temporal
closed the workflow meanwhile) runs again, for a query too, and counts again.
"""

from datetime import datetime
from typing import Final

from temporalio import workflow

from jobs import names
from jobs.errors import JobError
from llm_pb import llm_pb2

_UNCHECKED_MODEL: Final = "_OTHER"
"""For a job that was started past the gateway: nobody has checked its model, so its name must not become a label."""


def record_outcome(
    job: llm_pb2.JobRequest,
    final: "llm_pb2.JobState.ValueType",
    error: JobError | None,
    cancelled_at: datetime | None,
) -> None:
    """Record the workflow's outcome: a final state, with the error if there is one, and when a cancel was noted."""
    meter, info, now = workflow.metric_meter(), workflow.info(), workflow.now()
    model = {"gen_ai.request.model": job.model if names.MEMO_OPTIONS in workflow.memo() else _UNCHECKED_MODEL}
    labels = {**model, "llm.job.state": llm_pb2.JobState.Name(final).removeprefix("JOB_STATE_").lower()}
    if error is not None:
        labels["error.type"] = error.reason
    meter.create_histogram_timedelta(
        "llm.job.duration", "Time from Submit to the settled outcome. The count is the number of finished jobs.", "s"
    ).record(now - info.workflow_start_time, labels)
    if cancelled_at is not None and final == llm_pb2.JOB_STATE_CANCELLED:
        meter.create_histogram_timedelta(
            "llm.job.cancel.duration", "Time from Cancel to the settled outcome, for jobs that it ended.", "s"
        ).record(now - cancelled_at, model)
