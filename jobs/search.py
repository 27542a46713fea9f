"""The search attributes of a job."""

from temporalio.common import SearchAttributePair

from jobs import names
from llm_pb import llm_pb2


def attributes_of(job: llm_pb2.JobRequest, tenant: str = "") -> list[SearchAttributePair[str]]:
    """Return the search attributes that a job's workflow has from its start. An empty field or tenant has none."""
    values = (
        (names.TENANT_ID, tenant),
        (names.USER_ID, job.user_id),
        (names.REQUEST_ID, job.request_id),
        (names.MODEL, job.model),
        (names.PROJECT_ID, job.project_id),
    )
    return [SearchAttributePair(key, value) for key, value in values if value]


def user_attribute(user_id: str) -> list[SearchAttributePair[str]]:
    """Return the search attribute of a workflow that is about the jobs of a user; none for an empty user."""
    return [SearchAttributePair(names.USER_ID, user_id)] if user_id else []
