"""A job's ids: the workflow's, unique for each pair of user and request, and the trace's.

Temporal on PostgreSQL stores ids of at most 255 characters. A longer id is shortened to its beginning, a comma and the
SHA-256 of the whole. No other id holds a comma, so none can be mistaken for a shortened one.
"""

import hashlib
import re
from typing import Final

from llm_pb import llm_pb2

MAX_TEMPORAL_ID: Final = 255
"""Maximum length of a workflow id, and of a task queue's name, in characters: what Temporal stores on PostgreSQL."""

ID_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+~-]{0,127}")
"""The form of user_id, request_id and project_id."""

WORKFLOW_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._:@=+~/,-]{1,400}")
"""The form of a workflow id in a request: one of workflow_id(), or one chosen by hand in the Temporal CLI.

`/` occurs in the ids of a pipeline's steps, `,` in shortened ids. The maximum is 400 characters, because an earlier
version did not shorten and its jobs must still be found.
"""

_DELIVERY_PREFIX: Final = "llmnotify-"
_JOB: Final = "llmjob"
_BATCH: Final = "llmbatch"
_PIPELINE: Final = "llmpipe"
_LEDGER: Final = "llmledger"
_DELETION: Final = "llmdelete"
_BULK_DELETION: Final = "llmdeletes"
_SCHEDULE: Final = "llmschedule"
_FILE: Final = "llmfile"
_MODELS: Final = "llmmodels"
_FILE_ID_PREFIX: Final = "file-"

OUTPUT_ID_PREFIX: Final = "output-"
"""The beginning of the id of a file that is the output of a job, and of no other file's."""

FILE_ID_PATTERN: Final = re.compile(rf"(?:{_FILE_ID_PREFIX}|{OUTPUT_ID_PREFIX})[0-9a-f]{{64}}")
"""The form of a file's id."""

_TENANT_IN_ID: Final = re.compile(rf"(?:{_DELIVERY_PREFIX})*llm[a-z]*--([A-Za-z0-9](?:[A-Za-z0-9]|--){{0,31}})-(?!-)")

MAX_JOB_ID: Final = MAX_TEMPORAL_ID - len(_DELIVERY_PREFIX)
"""Maximum length of a job's workflow id in characters: 245, so that the id of its LLMDeliveryWorkflow fits, too."""

MAX_SCHEDULE_ID: Final = 230
"""Maximum length of a schedule's id in characters. Temporal puts 23 before it for a workflow of its own, and appends a
hyphen and 20 for the time to the id of each workflow that it starts."""

MAX_PIPELINE_ID: Final = 128
"""Maximum length of a pipeline's workflow id in characters: a step's job is `<pipeline id>/<path>`."""


def workflow_id(user_id: str, request_id: str, tenant: str = "") -> str:
    """Return `llmjob-<user>-<request>`, or `llmjob--<tenant>-<user>-<request>`, shortened beyond MAX_JOB_ID characters.

    The hyphens of tenant and user are doubled. User and request must match ID_PATTERN. A tenant is empty, or up to 32
    letters, digits and hyphens of which the first is no hyphen. The first single hyphen after the prefix then ends the
    tenant or user, because what follows never begins with one. So two different jobs never share an id.
    """
    if not tenant:
        return shortened(unshortened_workflow_id(user_id, request_id), MAX_JOB_ID)
    return shortened(f"{tenant_prefix(_JOB, tenant)}{_doubled(user_id)}-{request_id}", MAX_JOB_ID)


def batch_workflow_id(user_id: str, request_id: str, tenant: str = "") -> str:
    """Return the id of the LLMBatchWorkflow of a batch: `llmbatch-…`, in the form of workflow_id()."""
    prefix = tenant_prefix(_BATCH, tenant) if tenant else f"{_BATCH}-"
    return shortened(f"{prefix}{_doubled(user_id)}-{request_id}", MAX_JOB_ID)


def pipeline_workflow_id(user_id: str, request_id: str, tenant: str = "") -> str:
    """Return `llmpipe-<user>-<request>`, in the form of workflow_id() but of at most MAX_PIPELINE_ID characters."""
    prefix = tenant_prefix(_PIPELINE, tenant) if tenant else f"{_PIPELINE}-"
    return shortened(f"{prefix}{_doubled(user_id)}-{request_id}", MAX_PIPELINE_ID)


def item_workflow_id(batch_id: str, index: int) -> str:
    """Return the id of the job that an item of a batch is: `<batch id>/<line>`, shortened like workflow_id()."""
    return shortened(f"{batch_id}/{index}", MAX_JOB_ID)


def schedule_id(user_id: str, request_id: str, tenant: str = "") -> str:
    """Return `llmschedule-<user>-<request>`, in the form of workflow_id() but of at most MAX_SCHEDULE_ID characters."""
    prefix = tenant_prefix(_SCHEDULE, tenant) if tenant else f"{_SCHEDULE}-"
    return shortened(f"{prefix}{_doubled(user_id)}-{request_id}", MAX_SCHEDULE_ID)


def is_batch(id_: str) -> bool:
    """Return whether an id of a workflow that is a job, a batch or a pipeline is that of a batch."""
    return id_.startswith(f"{_BATCH}-") and not is_below(id_)


def is_pipeline(id_: str) -> bool:
    """Return whether an id of a workflow that is a job, a batch or a pipeline is that of a pipeline."""
    return id_.startswith(f"{_PIPELINE}-") and not is_below(id_)


def is_below(id_: str) -> bool:
    """Return whether an id is that of a step of a pipeline or of an item of a batch, which may run again under it."""
    return "/" in id_


def unshortened_workflow_id(user_id: str, request_id: str) -> str:
    """Return the id that earlier versions, which knew no tenants, gave to the job, whatever its length."""
    return f"{_JOB}-{_doubled(user_id)}-{request_id}"


def tenant_prefix(word: str, tenant: str) -> str:
    """Return `<word>--<tenant>-`, with which the ids of a tenant's workflows of one kind begin.

    `word` is `llm` and other small letters, so that tenant_of() knows it. What follows the prefix must begin with a
    letter or digit.
    """
    return f"{word}--{_doubled(tenant)}-"


def tenant_of(workflow_id: str) -> str:
    """Return the tenant that a workflow belongs to by its id; empty for one without a tenant.

    Knows the ids of workflow_id(), of tenant_prefix(), of their pipelines' steps and of their LLMDeliveryWorkflows.
    """
    found = _TENANT_IN_ID.match(workflow_id)
    return found[1].replace("--", "-") if found else ""


def ledger_workflow_id(tenant: str) -> str:
    """Return the id of the LLMLedgerWorkflow that counts the open jobs of a tenant."""
    return f"{tenant_prefix(_LEDGER, tenant)}jobs"


def files_ledger_workflow_id(tenant: str) -> str:
    """Return the id of the LLMLedgerWorkflow that counts the files of a tenant, or of none."""
    return _of_tenant(_LEDGER, tenant, "files")


def deletions_ledger_workflow_id(tenant: str) -> str:
    """Return the id of the LLMLedgerWorkflow that counts the open deletions by DeleteJobs of a tenant, or of none."""
    return _of_tenant(_LEDGER, tenant, "deletions")


def delivery_workflow_id(job_workflow_id: str) -> str:
    """Return the id of the LLMDeliveryWorkflow that continues a job's deliveries."""
    return shortened(unshortened_delivery_workflow_id(job_workflow_id), MAX_TEMPORAL_ID)


def unshortened_delivery_workflow_id(job_workflow_id: str) -> str:
    """Return the id that earlier versions gave to the LLMDeliveryWorkflow, whatever its length."""
    return f"{_DELIVERY_PREFIX}{job_workflow_id}"


def delivery_workflow_ids(job_workflow_id: str) -> list[str]:
    """Return the ids that the LLMDeliveryWorkflow of a job may have: an earlier version did not shorten them."""
    ids = (delivery_workflow_id(job_workflow_id), unshortened_delivery_workflow_id(job_workflow_id))
    return list(dict.fromkeys(ids))


def deletion_workflow_id(job_workflow_id: str) -> str:
    """Return the id of the LLMDeletionWorkflow that deletes a job."""
    return _of_tenant(_DELETION, tenant_of(job_workflow_id), job_workflow_id)


def bulk_deletion_workflow_id(tenant: str, name: str) -> str:
    """Return the id of the LLMBulkDeletionWorkflow of a tenant, by a name that no other one has."""
    return _of_tenant(_BULK_DELETION, tenant, name)


def file_id(user_id: str, request_id: str, tenant: str) -> str:
    """Return the id of the file under a key. The parts must keep their rules: none of them has a slash."""
    return f"{_FILE_ID_PREFIX}{hashlib.sha256(f'{tenant}/{user_id}/{request_id}'.encode()).hexdigest()}"


def file_workflow_id(id_: str, tenant: str) -> str:
    """Return the id of the LLMFileWorkflow of a file: another one for each tenant, whatever the file's id is."""
    return _of_tenant(_FILE, tenant, id_.removeprefix(_FILE_ID_PREFIX))


def models_workflow_id(tenant: str) -> str:
    """Return the id of the LLMModelsWorkflow that has the trained models of a tenant."""
    return _of_tenant(_MODELS, tenant, "registry")


def _of_tenant(word: str, tenant: str, name: str) -> str:
    return shortened(f"{tenant_prefix(word, tenant) if tenant else f'{word}-'}{name}", MAX_TEMPORAL_ID)


def owner(user_id: str, tenant: str = "") -> str:
    """Return one name for a user of a tenant, by which the users of all tenants differ: `<tenant>/<user>`, or the user.

    No user has a slash.
    """
    return f"{tenant}/{user_id}" if tenant else user_id


def _doubled(name: str) -> str:
    return name.replace("-", "--")


def redelivery_workflow_id(job_workflow_id: str) -> str:
    """Return the id of the LLMRedeliveryWorkflow of a job. It is a hash, so that no id of a user outlives the job."""
    return f"llmredelivery-{hashlib.sha256(job_workflow_id.encode()).hexdigest()}"


def shortened(id_: str, longest: int) -> str:
    """Return the id if it has at most `longest` bytes, else its beginning, a comma and its SHA-256 in hexadecimal."""
    data = id_.encode()
    if len(data) <= longest:
        return id_
    ending = f",{hashlib.sha256(data).hexdigest()}"
    return data[: longest - len(ending)].decode(errors="ignore") + ending


def job_digest(job: llm_pb2.JobRequest) -> str:
    """Return a digest that is equal for equal jobs, fields unknown to this build included."""
    return hashlib.sha256(job.SerializeToString(deterministic=True)).hexdigest()


def trace_id(traceparent: object) -> str:
    """Return the trace id of a W3C traceparent, 32 hexadecimal digits; empty if the traceparent is empty or invalid."""
    parts = traceparent.split("-") if isinstance(traceparent, str) else []
    return parts[1] if len(parts) == 4 else ""
