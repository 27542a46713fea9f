"""The job of every recorded history is readable, those of earlier versions among them."""

from pathlib import Path

import pytest

from jobs import names
from llm_pb import llm_pb2
from payload_converter import data_converter
from services.gateway.job_inputs import input_of
from tests.contract.test_replay import RECORDED, read


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
async def test_the_job_of_a_recorded_history_is_readable(path: Path) -> None:
    started = read(path).events[0]
    attributes = started.workflow_execution_started_event_attributes
    job = await input_of(started, data_converter, llm_pb2.JobRequest)
    if attributes.workflow_type.name == names.JOB_WORKFLOW_TYPE:
        assert job is not None
        assert job.user_id
    else:
        assert job is None
