"""Workflow ids."""

import re

from hypothesis import given
from hypothesis import strategies as st

from jobs.ids import ID_PATTERN, WORKFLOW_ID_PATTERN, job_digest, workflow_id
from llm_pb import llm_pb2

# Few characters, so that ids that could be confused turn up often.
ids = st.from_regex(re.compile(r"[ab][ab-]{0,6}"), fullmatch=True)


def test_the_id_names_user_and_request() -> None:
    assert workflow_id("alice", "req-456") == "llmjob-alice-req-456"
    assert workflow_id("user-123", "req-456") == "llmjob-user--123-req-456"


@given(one=st.tuples(ids, ids), other=st.tuples(ids, ids))
def test_two_pairs_never_share_an_id(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (workflow_id(*one) == workflow_id(*other)) == (one == other)


@given(st.from_regex(ID_PATTERN, fullmatch=True), st.from_regex(ID_PATTERN, fullmatch=True))
def test_every_id_is_taken_back(user: str, request: str) -> None:
    """What Submit returns, the other calls accept."""
    assert WORKFLOW_ID_PATTERN.fullmatch(workflow_id(user, request))


def test_the_digest_tells_jobs_apart_by_every_field() -> None:
    job = llm_pb2.JobRequest(user_id="u", prompt="p", params=llm_pb2.SamplingParams(seed=1))
    same = llm_pb2.JobRequest.FromString(job.SerializeToString())
    assert job_digest(job) == job_digest(same)
    same.params.seed = 0
    assert job_digest(job) != job_digest(same)
