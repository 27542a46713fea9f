"""Equality of jobs: a field that is set to its default equals a field that is not set."""

from jobs import options
from jobs.ids import job_digest
from llm_pb import common_pb2, llm_pb2


def same_job_digest(job: llm_pb2.JobRequest) -> str:
    """Return a digest that is equal for jobs that mean the same by llm.proto, whether or not they set defaults.

    The defaults of the operator and of models are not applied: they may change, but what a job asks for does not.
    """
    return job_digest(_normal_form(job))


def _normal_form(job: llm_pb2.JobRequest) -> llm_pb2.JobRequest:
    """Return a copy of the job without the fields that are set to their defaults."""
    normal = llm_pb2.JobRequest()
    normal.CopyFrom(job)
    if normal.priority == options.DEFAULT_PRIORITY:
        normal.ClearField("priority")
    if normal.job_class == common_pb2.JOB_CLASS_STANDARD:
        normal.ClearField("job_class")
    chosen = normal.notify_options
    if [*chosen.events] == [llm_pb2.NOTIFY_EVENT_FINISHED]:
        chosen.ClearField("events")
    if chosen.progress_interval.ToTimedelta() == options.DEFAULT_PROGRESS_INTERVAL:
        chosen.ClearField("progress_interval")
    for field in ("params", "timeouts", "notify_options", "budget"):
        # ByteSize includes the fields of newer versions.
        if getattr(normal, field).ByteSize() == 0:
            normal.ClearField(field)
    return normal
