"""JSON of callers as messages: every bad field is named, whatever its type."""

import pytest

from jobs.parsing import InvalidFields, parse
from llm_pb import llm_pb2, pipeline_pb2, schedule_pb2


def test_a_value_that_is_no_base64_is_named() -> None:
    with pytest.raises(InvalidFields) as wrong:
        parse({"promptFile": {"sha256": 5, "sizeBytes": "x"}}, llm_pb2.JobRequest())
    assert wrong.value.violations == (
        ("prompt_file.sha256", "must be bytes in base64"),
        ("prompt_file.size_bytes", "must be a whole number of 64 bits"),
    )


def test_base64_is_taken() -> None:
    assert parse({"prompt_file": {"sha256": "aGk="}}, llm_pb2.JobRequest()).prompt_file.sha256 == b"hi"


def test_a_time_is_taken_and_what_is_none_is_named() -> None:
    parsed = parse({"startTime": "2026-01-01T00:00:00Z"}, schedule_pb2.BackfillScheduleRequest())
    assert parsed.start_time.ToJsonString() == "2026-01-01T00:00:00Z"
    with pytest.raises(InvalidFields) as wrong:
        parse({"start_time": "today", "end_time": {"seconds": 5}}, schedule_pb2.BackfillScheduleRequest())
    expected = 'must be a time of RFC 3339, such as "2026-11-26T06:00:00Z"'
    assert wrong.value.violations == (("start_time", expected), ("end_time", expected))


def test_half_a_surrogate_pair_in_a_text_is_named() -> None:
    with pytest.raises(InvalidFields) as wrong:
        parse({"prompt": "x\ud800"}, llm_pb2.JobRequest())
    assert wrong.value.violations == (("prompt", "holds a surrogate, which is no character"),)


def test_half_a_surrogate_pair_as_the_name_of_an_enum_is_named() -> None:
    with pytest.raises(InvalidFields) as wrong:
        parse({"job_class": "\ud800", "messages": [{"role": "\ud800"}]}, llm_pb2.JobRequest())
    assert [field for field, _ in wrong.value.violations] == ["job_class", "messages[0].role"]


def test_half_a_surrogate_pair_within_an_any_is_refused() -> None:
    job = {"@type": f"type.googleapis.com/{llm_pb2.JobRequest.DESCRIPTOR.full_name}", "job_class": "\ud800"}
    with pytest.raises(InvalidFields):
        parse({"name": "essay", "input": job}, pipeline_pb2.CustomSpec())


@pytest.mark.parametrize(
    "value",
    [
        {"@type": 5},
        {"@type": None},
        {"@type": "type.googleapis.com/google.protobuf.StringValue"},
        {"@type": "type.googleapis.com/google.protobuf.Any", "value": {"@type": [], "value": 5}},
        [],
    ],
    ids=repr,
)
def test_an_any_that_is_none_is_named(value: object) -> None:
    """The first four were a 500 of the HTTP front."""
    with pytest.raises(InvalidFields) as wrong:
        parse({"custom": {"name": "essay", "input": value}}, pipeline_pb2.PipelineRequest())
    assert [field for field, _ in wrong.value.violations] == ["custom.input"]
