"""The start of a job's workflow, the same for a gateway and for a parent workflow.

start = job_start(job, chosen)
client.start_workflow(names.JOB_WORKFLOW_TYPE, job, id=start.id, memo=start.memo, ...)
workflow.start_child_workflow(names.JOB_WORKFLOW_TYPE, job, id=start.id, memo=start.memo, ...)

The quota of open jobs counts what a gateway starts: the gateway reserves a slot of the tenant's ledger before it calls
job_start, and names the ledger in the options, so that the job releases the slot. Child jobs are not counted. A parent
that counts them has to do both here, too: see workflows.llm_ledger.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.common import Priority, TypedSearchAttributes

from jobs import classes, names, options
from jobs.equality import same_job_digest
from jobs.ids import job_digest, owner, tenant_of, workflow_id
from jobs.options import memo_of
from jobs.search import Hash, attributes_of, hashed_values
from jobs.times import execution_timeout, watch_lease
from llm_pb import common_pb2, internal_pb2, llm_pb2

_MAX_FAIRNESS_KEY: Final = 64
"""Maximum size of a fairness key in Temporal, in bytes."""
FAIRNESS_KEY: Final = "fairness key"
"""Name under which `hash_` hashes the user of a fairness key. No search attribute has it."""


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
    hash_: Hash | None = None,
    create_time: Timestamp | None = None,
    waiter: str = "",
) -> JobStart:
    """Return the arguments to start the job with the options that were chosen for it.

    Options that are unset have their default: `JobOptions(notify_operator=False)` is whole. A bound of RetryOptions is
    therefore not lifted by leaving it unset.

    `id_` is the workflow's id, by default that of the job's tenant, user and request. It tells the job's tenant, so the
    child of a tenant's workflow, whose id begins with its parent's, belongs to the tenant. `priority` is the
    workflow's: a parent passes on its own (workflow.info().priority), which has the weight of its tenant. None, or one
    without a fairness key: fair turns of all users and classes. `traceparent` is the W3C trace context of the caller,
    empty without a trace. `hash_` is that of the tenant: it hashes search attributes and the fairness key. Without it
    they stay in clear. `create_time` is when the job was accepted, by default when its workflow starts. `waiter` is the
    id of a workflow that gets the signal JobSettled once the job's outcome is settled.
    """
    if id_ is None:
        id_ = workflow_id(job.user_id, job.request_id, tenant)
    tenant = tenant_of(id_)
    whole = options.with_defaults(chosen, job)
    memo = {**memo_of(whole), **digests(job)}
    if create_time is not None:
        memo[names.MEMO_CREATE_TIME] = create_time.ToJsonString()
    if waiter:
        memo[names.MEMO_WAITER] = waiter
    if traceparent:
        memo[names.MEMO_TRACEPARENT] = traceparent
    if job.labels:
        memo[names.MEMO_LABELS] = dict(job.labels)
    if hash_ is not None:
        memo[names.MEMO_SEARCH_ATTRIBUTES] = hashed_values(job)
    total = options.complete(whole, job).timeouts.total.ToTimedelta()
    if (lease := watch_lease(job, total)) is not None:
        memo[names.MEMO_CANCEL_IF_UNWATCHED] = lease.total_seconds()
    turns = fair_turns(fair_owner(job.user_id, tenant, hash_, classes.class_of(job)))
    return JobStart(
        id=id_,
        memo=memo,
        search_attributes=TypedSearchAttributes(attributes_of(job, tenant, hash_)),
        priority=priority if priority and priority.fairness_key else turns,
        execution_timeout=execution_timeout(total),
    )


def digests(job: llm_pb2.JobRequest) -> dict[str, str]:
    """Return the part of the memo that shows a repeated Submit whether its job is the same."""
    return {names.MEMO_DIGEST: job_digest(job), names.MEMO_SAME_JOB_DIGEST: same_job_digest(job)}


def fair_owner(
    user_id: str,
    tenant: str,
    hash_: Hash | None,
    job_class: "common_pb2.JobClass.ValueType" = common_pb2.JOB_CLASS_STANDARD,
) -> str:
    """Return the name by which the jobs of a user take turns, with the user hashed if the search attributes are.

    It is `<tenant>/<class>/<user>`. Without a tenant the first part is empty. JOB_CLASS_STANDARD has the name that jobs
    had before there were classes: `<tenant>/<user>`, or the user.
    """
    user = hash_(FAIRNESS_KEY, user_id) if hash_ is not None else user_id
    if job_class == common_pb2.JOB_CLASS_STANDARD:
        return owner(user, tenant)
    return f"{tenant}/{classes.NAMES[job_class]}/{user}"


def fair_turns(key: str, weight: float | None = None) -> Priority:
    """Return the priority of a workflow whose jobs take turns with those of other keys. A weight of None is 1.

    A key that is too long for Temporal is shortened to its tenant and class, if it has them, and a hash.
    """
    if len(key) > _MAX_FAIRNESS_KEY:
        before, slash, user = key.rpartition("/")
        key = f"{before}{slash}{hashlib.sha256(user.encode()).hexdigest()}"[:_MAX_FAIRNESS_KEY]
    return Priority(fairness_key=key, fairness_weight=weight)
