"""The time of a whole pipeline."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from temporalio import workflow

from llm_pb import internal_pb2
from pipelines.errors import StepFailed
from pipelines.execution import Execution

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("left", [timedelta(0), timedelta(microseconds=999), timedelta(milliseconds=1)])
def test_a_pipeline_is_over_when_no_step_begins_any_more(monkeypatch: pytest.MonkeyPatch, left: timedelta) -> None:
    """One whose step was refused in the last millisecond FAILED: to the pipeline there was time left."""
    monkeypatch.setattr(workflow, "now", lambda: NOW)
    monkeypatch.setattr(workflow, "info", lambda: SimpleNamespace(workflow_id="llmpipe-alice-1"))
    run = internal_pb2.PipelineRun()
    run.options.expire_time.FromDatetime(NOW + left)
    run.options.max_job_timeout.FromTimedelta(timedelta(days=1))
    execution = Execution(run)
    assert execution.is_over() == (left < timedelta(milliseconds=1))
    if execution.is_over():
        with pytest.raises(StepFailed):
            execution.within("step", None)
    else:
        assert execution.within("step", None) == left
