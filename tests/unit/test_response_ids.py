"""Ids of responses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.ids import WORKFLOW_ID_PATTERN
from jobs.response_ids import response_id, workflow_id_of


def test_the_id_is_base64url_without_padding() -> None:
    assert response_id("llmjob-alice-1") == "resp_bGxtam9iLWFsaWNlLTE"


@given(st.from_regex(WORKFLOW_ID_PATTERN, fullmatch=True))
def test_the_id_leads_back_to_the_job(workflow_id: str) -> None:
    id_ = response_id(workflow_id)
    assert set(id_.removeprefix("resp_")) <= {*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"}
    assert workflow_id_of(id_) == workflow_id


@pytest.mark.parametrize(
    "id_",
    [
        "",
        "resp_",
        "bGxtam9iLWFsaWNlLTE",
        "resp_bGxtam9iLWFsaWNlLTE=",
        "resp_bGxtam9iLWFsaWNlLTF",
        "resp_bGxtam9iLWFsaWNlLT",
        "resp_bGxtam9iLWFsaWNlL",
        "resp_bGxtam9i\nLWFsaWNlLTE",
        "resp_bGxt am9i",
        "resp_resp_bGxtam9iLWFsaWNlLTE",
        "resp_w6k",
        "resp_gICA",
        "resp_YSBi",
        "resp_\u00e9",
        "resp_++//",
        "RESP_bGxtam9iLWFsaWNlLTE",
    ],
    ids=[
        "empty",
        "without a job",
        "without the prefix",
        "padded",
        "with bits that no text has",
        "of two bytes, cut",
        "of an impossible length",
        "with a line feed",
        "with a space",
        "with the prefix twice",
        "of a letter that no workflow id has",
        "of bytes that are no text",
        "of a space",
        "not of ASCII",
        "of the other alphabet",
        "in capitals",
    ],
)
def test_what_is_no_id_of_a_response_is_refused(id_: str) -> None:
    with pytest.raises(ValueError, match="is no id of a response"):
        workflow_id_of(id_)
