"""Values of enums of a later version."""

import pytest

from durable_llm._enums import name_of
from durable_llm.cli._exits import Exit, exit_of_job
from durable_llm.errors import JobError
from llm_pb import llm_pb2


@pytest.mark.parametrize(("value", "name"), [(llm_pb2.WORKER_STATE_SERVING, "SERVING"), (99, "99")])
def test_a_value_has_a_name_or_its_number(value: int, name: str) -> None:
    assert name_of(llm_pb2.WorkerState, value, "WORKER_STATE_") == name


def test_a_job_that_ended_in_an_unknown_way_has_failed() -> None:
    status = llm_pb2.JobStatus(workflow_id="llmjob-a-b")
    status.state = 99  # type: ignore[assignment]
    error = JobError(status, llm_pb2.JobResult())
    assert (str(error), exit_of_job(error)) == ("99", Exit.FAILED)
