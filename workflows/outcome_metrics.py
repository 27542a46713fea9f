"""The metrics of a job's settled outcome. Finished jobs are counted only here.

The workflow counts them, because it alone sees every outcome, whichever process died. Temporal's meter is safe under
replay: a workflow that continues in another process counts nothing again. Three inaccuracies remain. A job that an
operator terminated is not counted, because its code no longer runs (Temporal's server counts it). A process that dies
before it is scraped loses its last counts. A workflow task that ran and was then lost (it failed or timed out, or
Temporal closed the workflow meanwhile) runs again, for a query too, and counts again.
"""

from datetime import datetime
from typing import Final

from temporalio import workflow

from jobs import names
from jobs.batches import FINAL_STATES
from jobs.classes import class_of, label_of
from jobs.errors import JobError
from jobs.ids import tenant_of
from llm_pb import batch_pb2, internal_pb2, llm_pb2

_UNCHECKED_MODEL: Final = "_OTHER"
"""Label of the model of a job that was started without the gateway. The model was not checked, so its name is no
label."""
_RUN_STATES: Final = ("succeeded", "failed", "timed_out", "cancelled", "refused")
"""How the run of a schedule can end."""


def record_outcome(
    job: llm_pb2.JobRequest,
    final: "llm_pb2.JobState.ValueType",
    error: JobError | None,
    cancelled_at: datetime | None,
    result: llm_pb2.JobResult | None,
) -> None:
    """Record the workflow's outcome: a final state; the error, when a cancel was noted, the result, if there is one."""
    meter, info, now = workflow.metric_meter(), workflow.info(), workflow.now()
    model = {"gen_ai.request.model": job.model if names.MEMO_OPTIONS in workflow.memo() else _UNCHECKED_MODEL}
    labels = {
        **model,
        "llm.job.state": llm_pb2.JobState.Name(final).removeprefix("JOB_STATE_").lower(),
        "llm.job.class": label_of(class_of(job)),
    }
    if error is not None:
        labels["error.type"] = error.reason
    meter.create_histogram_timedelta(
        "llm.job.duration",
        "Time from Submit to the settled outcome, by final state. Its count is the finished jobs.",
        "s",
    ).record(now - info.workflow_start_time, labels)
    if cancelled_at is not None and final == llm_pb2.JOB_STATE_CANCELLED:
        meter.create_histogram_timedelta(
            "llm.job.cancel.duration", "Time from Cancel to the settled outcome of the jobs that it ended.", "s"
        ).record(now - cancelled_at, model)
    if result is not None and result.metadata.HasField("cost_micros"):
        meter.create_counter(
            "llm.job.cost.micros", "Cost of the jobs whose outcome is settled, in millionths of the currency."
        ).add(result.metadata.cost_micros, {**model, "llm.tenant": tenant_of(info.workflow_id)})


def record_batch(status: batch_pb2.BatchStatus) -> None:
    """Record that a batch has ended, by its final state."""
    ended = workflow.metric_meter().create_counter("llm.batch.ended", "Batches that have ended, by state.", "{batch}")
    for state in FINAL_STATES:
        # The series exists before the first failure, which an increase does not show otherwise.
        name = batch_pb2.BatchState.Name(state).removeprefix("BATCH_STATE_").lower()
        ended.add(int(state == status.state), {"llm.batch.state": name})


def record_run(action: internal_pb2.ScheduledAction, job: internal_pb2.ScheduledJob) -> None:
    """Record how the run of a schedule has ended, and what its job shows of the model if it is a canary."""
    meter = workflow.metric_meter()
    if job.workflow_id and not job.state:
        # The job was deleted before its outcome was read.
        return
    state = "refused" if not job.workflow_id else llm_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
    if action.canary:
        model = {"gen_ai.request.model": action.schedule.job.model}
        runs = meter.create_counter(
            "llm.canary.runs", "Runs of the canary of a model, by how its job ended; refused: there was none.", "{run}"
        )
        for other in _RUN_STATES:
            # The series exists before the first failure, which an increase does not show otherwise.
            runs.add(int(other == state), {**model, "llm.job.state": other})
        if job.HasField("time_to_first_token"):
            meter.create_histogram_timedelta(
                "llm.canary.time_to_first_token", "Time from a canary's acceptance to its first token.", "s"
            ).record(job.time_to_first_token.ToTimedelta(), model)
    else:
        meter.create_counter(
            "llm.schedule.runs", "Runs of schedules, by how their jobs ended; refused: there was none.", "{run}"
        ).add(1, {"llm.job.state": state})
