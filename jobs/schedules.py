"""Schedules: the job that a run starts, and how a run ended."""

import hashlib
from datetime import UTC, datetime
from typing import Final

from llm_pb import common_pb2, internal_pb2, llm_pb2, schedule_pb2

_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_TIME_LENGTH: Final = len("2026-11-26T06:00:00Z")
MAX_REQUEST_ID: Final = 128 - 1 - _TIME_LENGTH
"""Maximum length of a schedule's request_id in characters: the request_id of a job is it, a hyphen and a time."""
CANARY_USER: Final = "llm.canary"
"""The user whose jobs the canaries' are. Callers have no schedules of it."""
FAILED: Final = frozenset({llm_pb2.JOB_STATE_FAILED, llm_pb2.JOB_STATE_TIMED_OUT})
"""The final states of a job that make its run a failed one. A job that was cancelled was stopped by somebody."""


def job_of(schedule: schedule_pb2.Schedule, nominal: datetime) -> llm_pb2.JobRequest:
    """Return the job of the run for a time of the schedule. Equal arguments make equal jobs."""
    job = llm_pb2.JobRequest()
    job.CopyFrom(schedule.job)
    job.user_id = schedule.user_id
    job.request_id = f"{schedule.request_id}-{nominal.astimezone(UTC).strftime(_TIME)}"
    if not job.job_class:
        job.job_class = common_pb2.JOB_CLASS_SCHEDULED
    return job


def as_submitted(schedule: schedule_pb2.Schedule) -> llm_pb2.SubmitRequest:
    """Return a SubmitRequest like those of the schedule's runs, with the schedule's own request_id, for checks."""
    job = job_of(schedule, datetime.fromtimestamp(0, UTC))
    job.request_id = schedule.request_id
    return llm_pb2.SubmitRequest(job=job)


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
