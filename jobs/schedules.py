"""Schedules: what a run starts, and how a run ended."""

import hashlib
from datetime import UTC, datetime
from typing import Final

from google.protobuf.message import Message

from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2, pipeline_pb2, schedule_pb2

StartRequest = llm_pb2.SubmitRequest | batch_pb2.CreateBatchRequest | pipeline_pb2.SubmitPipelineRequest
"""What a run of a schedule asks for."""
Work = llm_pb2.JobRequest | batch_pb2.BatchRequest | pipeline_pb2.PipelineRequest
FIELDS: Final[dict[type[Message], str]] = {
    llm_pb2.SubmitRequest: "job",
    batch_pb2.CreateBatchRequest: "batch",
    pipeline_pb2.SubmitPipelineRequest: "pipeline",
}
"""The field of each request that holds what is started. The action of a schedule has the same name."""

_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_TIME_LENGTH: Final = len("2026-11-26T06:00:00Z")
MAX_REQUEST_ID: Final = 128 - 1 - _TIME_LENGTH
"""Maximum length of a schedule's request_id in characters: the request_id of a job is it, a hyphen and a time."""
CANARY_USER: Final = "llm.canary"
"""The user whose jobs the canaries' are. Callers have no schedules of it."""
FAILED: Final = frozenset({llm_pb2.JOB_STATE_FAILED, llm_pb2.JOB_STATE_TIMED_OUT})
"""The final states of a job that make its run a failed one. A job that was cancelled was stopped by somebody."""


def request_of(schedule: schedule_pb2.Schedule, nominal: datetime) -> StartRequest:
    """Return what the run for a time of the schedule asks for. Equal arguments make equal requests."""
    return _request(schedule, f"{schedule.request_id}-{nominal.astimezone(UTC).strftime(_TIME)}")


def as_submitted(schedule: schedule_pb2.Schedule) -> StartRequest:
    """Return a request like those of the schedule's runs, with the schedule's own request_id, for checks."""
    return _request(schedule, schedule.request_id)


def work_of(request: StartRequest) -> Work:
    """Return the job, batch or pipeline of a request."""
    work: Work = getattr(request, FIELDS[type(request)])
    return work


def _request(schedule: schedule_pb2.Schedule, request_id: str) -> StartRequest:
    request: StartRequest
    match schedule.WhichOneof("action"):
        case "batch":
            request = batch_pb2.CreateBatchRequest(batch=schedule.batch)
        case "pipeline":
            request = pipeline_pb2.SubmitPipelineRequest(pipeline=schedule.pipeline)
        case _:
            request = llm_pb2.SubmitRequest(job=schedule.job)
    work = work_of(request)
    work.user_id, work.request_id = schedule.user_id, request_id
    if not work.job_class:
        work.job_class = common_pb2.JOB_CLASS_SCHEDULED
    return request


def nominal_time_of(workflow_id: str) -> datetime | None:
    """Return the time of the schedule that ends the id of a workflow which Temporal has started for it; None if none
    does."""
    try:
        return datetime.strptime(workflow_id[-_TIME_LENGTH:], _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def digest_of(schedule: schedule_pb2.Schedule) -> bytes:
    """Return a digest that is equal for equal schedules, fields unknown to this build included."""
    return hashlib.sha256(schedule.SerializeToString(deterministic=True)).digest()


def has_failed(job: internal_pb2.ScheduledJob) -> bool:
    """Return whether a run has failed whose job ended so."""
    return job.state in FAILED or not job.workflow_id
