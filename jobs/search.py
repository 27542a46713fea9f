"""The search attributes of a job."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from temporalio.common import SearchAttributeKey, SearchAttributePair, TypedSearchAttributes

from jobs import names
from jobs.classes import class_of
from llm_pb import common_pb2, llm_pb2

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
    job_class = class_of(job)
    values = (
        (names.TENANT_ID, tenant),
        (names.JOB_CLASS, "" if job_class == common_pb2.JOB_CLASS_STANDARD else common_pb2.JobClass.Name(job_class)),
        (names.USER_ID, job.user_id),
        (names.REQUEST_ID, job.request_id),
        (names.MODEL, job.model),
        (names.PROJECT_ID, job.project_id),
    )
    return [(key, value) for key, value in values if value]


class AboutUser(NamedTuple):
    """What a workflow that is about the jobs of a user holds of the user, under the names of its start's arguments."""

    search_attributes: TypedSearchAttributes
    memo: Mapping[str, Any] | None


def user_value(user_id: str, hash_: Hash | None) -> str:
    """Return the value of the search attribute UserID. `hash_` is as in attributes_of()."""
    return hash_(names.USER_ID.name, user_id) if hash_ is not None and user_id else user_id


def about_user(user_id: str, value: str) -> AboutUser:
    """Return what a workflow that is about the jobs of a user holds; nothing for an empty user.

    `value` is that of user_value(). A user whose value is hashed is in the memo, too, as that of a job.
    """
    if not user_id:
        return AboutUser(TypedSearchAttributes([]), None)
    memo = {names.MEMO_SEARCH_ATTRIBUTES: {names.USER_ID.name: user_id}} if value != user_id else None
    return AboutUser(TypedSearchAttributes([SearchAttributePair(names.USER_ID, value)]), memo)
