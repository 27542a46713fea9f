"""A job's ids: the workflow's, one for each pair of user and request and never one for two, and its trace's."""

import hashlib
import re
from typing import Final

from llm_pb import llm_pb2

ID_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+~-]{0,127}")
"""The form of user_id, request_id and project_id."""

WORKFLOW_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._:@=+~-]{1,400}")
"""The form of a workflow id, one that was chosen by hand in the Temporal CLI included."""


def workflow_id(user_id: str, request_id: str) -> str:
    """Return `llmjob-<user>-<request>` with the user's hyphens doubled.

    Both ids must match ID_PATTERN. The first single hyphen after the prefix then ends the user, because a request never
    begins with one: two different pairs never share an id.
    """
    return f"llmjob-{user_id.replace('-', '--')}-{request_id}"


def delivery_workflow_id(job_workflow_id: str) -> str:
    """Return the id of the LLMDeliveryWorkflow that goes on with a job's deliveries."""
    return f"llmnotify-{job_workflow_id}"


def job_digest(job: llm_pb2.JobRequest) -> str:
    """Return a digest that is equal for equal jobs, fields unknown to this build included."""
    return hashlib.sha256(job.SerializeToString(deterministic=True)).hexdigest()


def trace_id(traceparent: object) -> str:
    """Return the trace id of a W3C traceparent: 32 hexadecimal digits; empty when it is empty or none."""
    parts = traceparent.split("-") if isinstance(traceparent, str) else []
    return parts[1] if len(parts) == 4 else ""
