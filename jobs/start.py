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

from temporalio.common import Priority, TypedSearchAttributes

from jobs import names, options
from jobs.equality import same_job_digest
from jobs.ids import job_digest, owner, tenant_of, workflow_id
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
    tenant: str = "",
    priority: Priority | None = None,
    traceparent: str = "",
) -> JobStart:
    """Return the arguments to start the job with the options that were chosen for it.

    `id_` is the workflow's id, by default that of the job's tenant, user and request. It tells the job's tenant, so the
    child of a tenant's workflow, whose id begins with its parent's, belongs to the tenant. `priority` is the
    workflow's: a parent passes on its own (workflow.info().priority), which has the weight of its tenant. None, or one
    without a fairness key: fair turns of all users. `traceparent` is the W3C trace context of the caller, empty without
    a trace.
    """
    if id_ is None:
        id_ = workflow_id(job.user_id, job.request_id, tenant)
    tenant = tenant_of(id_)
    memo = {**memo_of(chosen), **digests(job)}
    if traceparent:
        memo[names.MEMO_TRACEPARENT] = traceparent
    return JobStart(
        id=id_,
        memo=memo,
        search_attributes=TypedSearchAttributes(attributes_of(job, tenant)),
        priority=priority if priority and priority.fairness_key else fair_turns(owner(job.user_id, tenant)),
        execution_timeout=execution_timeout(options.complete(chosen, job).timeouts.total.ToTimedelta()),
    )


def digests(job: llm_pb2.JobRequest) -> dict[str, str]:
    """Return the part of the memo that shows a repeated Submit whether its job is the same."""
    return {names.MEMO_DIGEST: job_digest(job), names.MEMO_SAME_JOB_DIGEST: same_job_digest(job)}


def fair_turns(key: str, weight: float | None = None) -> Priority:
    """Return the priority of a workflow whose jobs take turns with those of other keys. A weight of None is 1.

    A key that is too long for Temporal is shortened to its tenant, if it has one, and a hash.
    """
    if len(key) > _MAX_FAIRNESS_KEY:
        tenant, slash, user = key.rpartition("/")
        key = f"{tenant}{slash}{hashlib.sha256(user.encode()).hexdigest()}"[:_MAX_FAIRNESS_KEY]
    return Priority(fairness_key=key, fairness_weight=weight)
