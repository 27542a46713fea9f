"""When two jobs are the same job: a default that is written out says no more than one that is left out."""

from jobs import options
from jobs.ids import job_digest
from llm_pb import llm_pb2


def same_job_digest(job: llm_pb2.JobRequest) -> str:
    """Return a digest that is equal for jobs that ask for the same by llm.proto, however they write it.

    The defaults of the operator and of models are left alone: they may change, what a job asks for does not.
    """
    return job_digest(_normal_form(job))


def _normal_form(job: llm_pb2.JobRequest) -> llm_pb2.JobRequest:
    """Return the job with every field left out that says what its absence says."""
    normal = llm_pb2.JobRequest()
    normal.CopyFrom(job)
    if normal.priority == options.DEFAULT_PRIORITY:
        normal.ClearField("priority")
    chosen = normal.notify_options
    if [*chosen.events] == [llm_pb2.NOTIFY_EVENT_FINISHED]:
        chosen.ClearField("events")
    if chosen.progress_interval.ToTimedelta() == options.DEFAULT_PROGRESS_INTERVAL:
        chosen.ClearField("progress_interval")
    for field in ("params", "timeouts", "notify_options"):
        # Fields from the future count as bytes.
        if getattr(normal, field).ByteSize() == 0:
            normal.ClearField(field)
    return normal
