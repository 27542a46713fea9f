"""The search attributes of a job."""

from collections.abc import Callable, Sequence
from typing import Final

from temporalio.common import SearchAttributeKey, SearchAttributePair

from jobs import names
from llm_pb import llm_pb2

Hash = Callable[[str, str], str]
"""Returns the hash of a search attribute, by its name and value."""

HASHED: Final = frozenset({names.USER_ID.name, names.REQUEST_ID.name, names.PROJECT_ID.name})
"""Names of the search attributes that may be hashed: those that a caller chooses freely."""


def attributes_of(
    job: llm_pb2.JobRequest, tenant: str = "", hash_: Hash | None = None
) -> list[SearchAttributePair[str]]:
    """Return the search attributes that a job's workflow has from its start. An empty field or tenant has none.

    With `hash_` those in HASHED have its hash as their value.
    """
    return [
        SearchAttributePair(key, hash_(key.name, value) if hash_ is not None and key.name in HASHED else value)
        for key, value in _values(job, tenant)
    ]


def hashed_values(job: llm_pb2.JobRequest) -> dict[str, str]:
    """Return the values, by name, of the search attributes that attributes_of() hashes."""
    return {key.name: value for key, value in _values(job) if key.name in HASHED}


def _values(job: llm_pb2.JobRequest, tenant: str = "") -> Sequence[tuple[SearchAttributeKey[str], str]]:
    values = (
        (names.TENANT_ID, tenant),
        (names.USER_ID, job.user_id),
        (names.REQUEST_ID, job.request_id),
        (names.MODEL, job.model),
        (names.PROJECT_ID, job.project_id),
    )
    return [(key, value) for key, value in values if value]


def user_attribute(user_id: str, hash_: Hash | None = None) -> list[SearchAttributePair[str]]:
    """Return the search attribute of a workflow that is about the jobs of a user; none for an empty user.

    `hash_` is as in attributes_of().
    """
    if not user_id:
        return []
    return [SearchAttributePair(names.USER_ID, hash_(names.USER_ID.name, user_id) if hash_ is not None else user_id)]
