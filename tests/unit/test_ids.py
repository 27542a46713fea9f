"""Workflow ids."""

import re

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from jobs.equality import same_job_digest
from jobs.ids import (
    ID_PATTERN,
    MAX_JOB_ID,
    MAX_PIPELINE_ID,
    MAX_TEMPORAL_ID,
    WORKFLOW_ID_PATTERN,
    bulk_deletion_workflow_id,
    deletion_workflow_id,
    delivery_workflow_id,
    job_digest,
    shortened,
    tenant_of,
    tenant_prefix,
    unshortened_workflow_id,
    workflow_id,
)
from llm_pb import llm_pb2
from runtime.tenants import TENANT_PATTERN

# Few characters make ids that could be confused frequent.
ids = st.from_regex(re.compile(r"[ab][ab-]{0,6}"), fullmatch=True)
any_ids = st.from_regex(ID_PATTERN, fullmatch=True)
# These ids are about as long as the limit above which ids are shortened, and differ only at their ends.
long_ids = st.builds(str.__add__, st.sampled_from(["a" * 100, "a" * 121, "a" + "-" * 60, "a" + "-" * 121]), ids)
pairs = st.tuples(ids | long_ids, ids | long_ids)
tenants = st.just("") | st.from_regex(re.compile(r"[ab][ab-]{0,3}"), fullmatch=True)
any_tenants = st.just("") | st.from_regex(TENANT_PATTERN, fullmatch=True)


def test_the_id_names_user_and_request() -> None:
    assert workflow_id("alice", "req-456") == "llmjob-alice-req-456"
    assert workflow_id("user-123", "req-456") == "llmjob-user--123-req-456"


def test_a_long_id_ends_in_a_hash() -> None:
    """An id of 246 characters or more is shortened. The form never changes, because stored jobs are found by it."""
    longest = workflow_id("u" * 128, "r" * 109)
    assert longest == f"llmjob-{'u' * 128}-{'r' * 109}"
    assert len(longest) == MAX_JOB_ID == 245
    assert workflow_id("u" * 128, "r" * 110) == (
        f"llmjob-{'u' * 128}-{'r' * 44},6bf9b0c77e37f2044b1416fa6f627a136391913ee6f4084a34d3e24b451f26b0"
    )


@given(one=pairs, other=pairs)
def test_two_pairs_never_share_an_id(one: tuple[str, str], other: tuple[str, str]) -> None:
    """The ids of their delivery workflows differ as well."""
    assert (workflow_id(*one) == workflow_id(*other)) == (one == other)
    deliveries = [delivery_workflow_id(workflow_id(*pair)) for pair in (one, other)]
    assert (deliveries[0] == deliveries[1]) == (one == other)


def test_the_id_of_a_tenants_job_names_the_tenant() -> None:
    assert workflow_id("alice", "req-456", "acme") == "llmjob--acme-alice-req-456"
    assert workflow_id("user-123", "req-456", "acme-eu-") == "llmjob--acme--eu---user--123-req-456"


@given(tenants, pairs, tenants, pairs)
def test_two_tenants_never_share_an_id(
    one_tenant: str, one: tuple[str, str], other_tenant: str, other: tuple[str, str]
) -> None:
    """The ids of their delivery workflows differ as well."""
    same = (one_tenant, one) == (other_tenant, other)
    ids = [workflow_id(*one, one_tenant), workflow_id(*other, other_tenant)]
    assert (ids[0] == ids[1]) == same
    assert (delivery_workflow_id(ids[0]) == delivery_workflow_id(ids[1])) == same


@given(any_tenants, any_ids | long_ids, any_ids | long_ids)
def test_an_id_tells_its_tenant(tenant: str, user: str, request: str) -> None:
    """Shortened ids, those of deliveries, of a pipeline's steps and of other workflows of a tenant tell it, too."""
    id_ = workflow_id(user, request, tenant)
    assert len(id_) <= MAX_JOB_ID
    assert WORKFLOW_ID_PATTERN.fullmatch(id_)
    assert tenant_of(id_) == tenant_of(f"{id_}/draft/1") == tenant
    assert tenant_of(delivery_workflow_id(id_)) == tenant_of(delivery_workflow_id(delivery_workflow_id(id_))) == tenant
    assert tenant_of(unshortened_workflow_id(user, request)) == ""
    if tenant:
        assert tenant_of(shortened(f"{tenant_prefix('llmbatch', tenant)}{user}", MAX_JOB_ID)) == tenant


@pytest.mark.parametrize("id_", ["mine", "my--job-1", "llmjob--", "llmjob--a", "llmjob---a-b-c", "llmjob--a--b", "llm"])
def test_an_id_of_another_form_is_of_no_tenant(id_: str) -> None:
    """Somebody chose it by hand in the Temporal CLI."""
    assert tenant_of(id_) == ""


@given(any_ids | long_ids, any_ids | long_ids)
def test_every_id_is_taken_back_and_fits(user: str, request: str) -> None:
    """The other calls accept every id, an earlier version's as well. PostgreSQL can store each id of this version."""
    id_ = workflow_id(user, request)
    assert WORKFLOW_ID_PATTERN.fullmatch(id_)
    assert len(id_) <= MAX_JOB_ID
    assert len(delivery_workflow_id(id_)) <= MAX_TEMPORAL_ID
    earlier = unshortened_workflow_id(user, request)
    assert WORKFLOW_ID_PATTERN.fullmatch(earlier)
    assert (id_ == earlier) == (len(earlier) <= MAX_JOB_ID)


@given(one=pairs, other=pairs, tenant=st.sampled_from(["", "acme", "a-b"]))
def test_a_deletion_is_of_its_jobs_tenant(one: tuple[str, str], other: tuple[str, str], tenant: str) -> None:
    """Each job has a deletion of its own, whose id fits and can be asked for."""
    jobs = [workflow_id(*pair, tenant) for pair in (one, other)]
    deletions = [deletion_workflow_id(job) for job in jobs]
    assert (deletions[0] == deletions[1]) == (jobs[0] == jobs[1])
    for id_ in (*deletions, bulk_deletion_workflow_id(tenant, "0" * 32)):
        assert tenant_of(id_) == tenant
        assert len(id_) <= MAX_TEMPORAL_ID
        assert WORKFLOW_ID_PATTERN.fullmatch(id_)
        assert id_ not in jobs


@given(st.text("abc./-", min_size=1, max_size=600), st.text("abc./-", min_size=1, max_size=600))
def test_no_other_id_is_mistaken_for_a_shortened_one(one: str, other: str) -> None:
    """Only a shortened id has a comma. No user, request, pipeline or path may have one."""
    for id_ in (one, other):
        assert ("," in shortened(id_, MAX_JOB_ID)) == (len(id_) > MAX_JOB_ID)
        assert len(shortened(id_, MAX_JOB_ID)) <= MAX_JOB_ID
    assert (shortened(one, MAX_JOB_ID) == shortened(other, MAX_JOB_ID)) == (one == other)
    assert not ID_PATTERN.fullmatch("a,")


def test_the_steps_of_a_pipeline_have_room() -> None:
    """A path of 116 characters next to a pipeline's id of maximum length is not shortened."""
    step = f"{'p' * MAX_PIPELINE_ID}/{'draft/'.ljust(116, '1')}"
    assert shortened(step, MAX_JOB_ID) == step
    assert WORKFLOW_ID_PATTERN.fullmatch(step)


def test_the_digest_tells_jobs_apart_by_every_field() -> None:
    job = llm_pb2.JobRequest(user_id="u", prompt="p", params=llm_pb2.SamplingParams(seed=1))
    same = llm_pb2.JobRequest.FromString(job.SerializeToString())
    assert job_digest(job) == job_digest(same)
    same.params.seed = 0
    assert job_digest(job) != job_digest(same)


ASKED = {"user_id": "u", "request_id": "r", "model": "m", "prompt": "p"}


@pytest.mark.parametrize(
    "written",
    [
        {"priority": 3},
        {"priority": 0},
        {"params": {}},
        {"timeouts": {}},
        {"notify_options": {}},
        {"notify_options": {"events": ["NOTIFY_EVENT_FINISHED"], "progress_interval": "10s", "include_output": False}},
        {"project_id": "", "notify": [], "messages": []},
    ],
)
def test_a_default_that_is_written_out_changes_no_job(written: dict[str, object]) -> None:
    bare = json_format.ParseDict(ASKED, llm_pb2.JobRequest())
    whole = json_format.ParseDict({**ASKED, **written}, llm_pb2.JobRequest())
    before = whole.SerializeToString()
    assert same_job_digest(whole) == same_job_digest(bare)
    assert whole.SerializeToString() == before


@pytest.mark.parametrize(
    "other",
    [
        {"priority": 2},
        {"params": {"temperature": 1}},
        {"params": {"logprobs": 0}},
        {"timeouts": {"total": "28800s"}},
        {"notify_options": {"events": ["NOTIFY_EVENT_STARTED"]}},
        {"notify_options": {"progress_interval": "11s"}},
        {"notify": [{"webhook": {"url": "https://a.example"}}]},
        {"labels": {"a": ""}},
    ],
)
def test_whatever_may_make_a_difference_makes_another_job(other: dict[str, object]) -> None:
    """A value that equals a default of the operator or the model makes another job, too."""
    one = json_format.ParseDict(ASKED, llm_pb2.JobRequest())
    assert same_job_digest(one) != same_job_digest(json_format.ParseDict({**ASKED, **other}, llm_pb2.JobRequest()))


def test_the_order_of_labels_makes_no_other_job() -> None:
    pairs = {f"key-{number}": str(number) for number in range(16)}
    one, other = (
        json_format.ParseDict({**ASKED, "labels": dict(items)}, llm_pb2.JobRequest())
        for items in (pairs.items(), reversed(pairs.items()))
    )
    assert (same_job_digest(one), job_digest(one)) == (same_job_digest(other), job_digest(other))


def test_a_field_from_the_future_makes_another_job() -> None:
    plain = json_format.ParseDict(ASKED, llm_pb2.JobRequest())
    newer = llm_pb2.JobRequest.FromString(plain.SerializeToString() + b"\x52\x03\xa0\x06\x01")
    assert newer.timeouts.ByteSize()
    assert same_job_digest(plain) != same_job_digest(newer)
