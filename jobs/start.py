"""The start of a job's workflow, the same for a gateway and for a parent workflow.

start = job_start(job, chosen)
client.start_workflow(names.JOB_WORKFLOW_TYPE, job, id=start.id, memo=start.memo, ...)
workflow.start_child_workflow(names.JOB_WORKFLOW_TYPE, job, id=start.id, memo=start.memo, ...)
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.common import Priority, TypedSearchAttributes

from jobs import names, options
from jobs.equality import same_job_digest
from jobs.ids import job_digest, workflow_id
from jobs.options import memo_of
from jobs.search import attributes_of
from jobs.times import execution_timeout
from llm_pb import internal_pb2, llm_pb2

_MAX_FAIRNESS_KEY: Final = 64
"""Maximum size of a fairness key in Temporal, in bytes."""


@dataclass(frozen=True)
class JobStart:
    """The arguments of a job's start, under the names that start_workflow and start_child_workflow have for them."""

    id: str
    memo: Mapping[str, Any]
    search_attributes: TypedSearchAttributes
    priority: Priority
    """The workflow's priority. The job's own applies only to its activity on the GPU: see jobs.options.gpu_priority."""
    execution_timeout: timedelta


def job_start(
    job: llm_pb2.JobRequest,
    chosen: internal_pb2.JobOptions,
    *,
    id_: str | None = None,
    traceparent: str = "",
    create_time: Timestamp | None = None,
) -> JobStart:
    """Return the arguments to start the job with the options that were chosen for it.

    `id_` is the workflow's id, by default that of the job's user and request. `traceparent` is the W3C trace context of
    the caller, empty without a trace. `create_time` is when the job was accepted, by default when its workflow starts.
    """
    memo = {**memo_of(chosen), **digests(job)}
    if create_time is not None:
        memo[names.MEMO_CREATE_TIME] = create_time.ToJsonString()
    if traceparent:
        memo[names.MEMO_TRACEPARENT] = traceparent
    return JobStart(
        id=workflow_id(job.user_id, job.request_id) if id_ is None else id_,
        memo=memo,
        search_attributes=TypedSearchAttributes(attributes_of(job)),
        priority=Priority(fairness_key=_fairness_key(job.user_id)),
        execution_timeout=execution_timeout(options.complete(chosen, job).timeouts.total.ToTimedelta()),
    )


def digests(job: llm_pb2.JobRequest) -> dict[str, str]:
    """Return the part of the memo that shows a repeated Submit whether its job is the same."""
    return {names.MEMO_DIGEST: job_digest(job), names.MEMO_SAME_JOB_DIGEST: same_job_digest(job)}


def _fairness_key(user_id: str) -> str:
    if len(user_id) <= _MAX_FAIRNESS_KEY:
        return user_id
    return hashlib.sha256(user_id.encode()).hexdigest()[:_MAX_FAIRNESS_KEY]
