"""Workflow ids."""

import re

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from jobs.equality import same_job_digest
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
    ],
)
def test_whatever_may_make_a_difference_makes_another_job(other: dict[str, object]) -> None:
    """A default of the operator's or of a model's, too."""
    one = json_format.ParseDict(ASKED, llm_pb2.JobRequest())
    assert same_job_digest(one) != same_job_digest(json_format.ParseDict({**ASKED, **other}, llm_pb2.JobRequest()))


def test_a_field_from_the_future_makes_another_job() -> None:
    plain = json_format.ParseDict(ASKED, llm_pb2.JobRequest())
    newer = llm_pb2.JobRequest.FromString(plain.SerializeToString() + b"\x52\x03\xa0\x06\x01")
    assert newer.timeouts.ByteSize()
    assert same_job_digest(plain) != same_job_digest(newer)
