"""A repeat of a batch or pipeline is the one that means the same."""

import pytest
from google.protobuf.message import Message

from jobs.work_start import digest
from llm_pb import batch_pb2, common_pb2, pipeline_pb2

BUDGET = common_pb2.Budget
STANDARD, BACKGROUND = common_pb2.JOB_CLASS_STANDARD, common_pb2.JOB_CLASS_BACKGROUND


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pipeline_pb2.PipelineRequest(), pipeline_pb2.PipelineRequest(job_class=STANDARD, budget=BUDGET())),
        (batch_pb2.BatchRequest(), batch_pb2.BatchRequest(job_class=BACKGROUND, budget=BUDGET())),
    ],
    ids=["pipeline", "batch"],
)
def test_a_default_equals_a_field_that_is_not_set(one: Message, other: Message) -> None:
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pipeline_pb2.PipelineRequest(), pipeline_pb2.PipelineRequest(job_class=BACKGROUND)),
        (pipeline_pb2.PipelineRequest(), pipeline_pb2.PipelineRequest(budget=BUDGET(output_tokens=1))),
        (batch_pb2.BatchRequest(), batch_pb2.BatchRequest(job_class=STANDARD)),
    ],
    ids=["pipeline-class", "pipeline-budget", "batch-class"],
)
def test_what_means_something_else_differs(one: Message, other: Message) -> None:
    assert digest(one) != digest(other)
