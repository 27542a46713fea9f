"""The metrics of pipelines, counted by their workflows as those of jobs are: see workflows.outcome_metrics."""

from typing import Final

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs.pipelines import ENDED_STEPS, FINAL_STATES, name_of
    from llm_pb import llm_pb2, pipeline_pb2
    from pipelines.registry import REGISTERED

_UNKNOWN: Final = "_OTHER"
"""Label of a pipeline whose name is registered nowhere."""


def record_end(pipeline: pipeline_pb2.PipelineRequest, final: "llm_pb2.JobState.ValueType") -> None:
    """Count and log that a pipeline has ended, with its final state."""
    ended = workflow.metric_meter().create_counter(
        "llm.pipeline.ended", "Pipelines that have ended, by name and final state.", "{pipeline}"
    )
    for state in FINAL_STATES:
        # The series exists before the first failure, which an increase does not show otherwise.
        name = llm_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower()
        ended.add(int(state == final), {"llm.pipeline": _label(pipeline), "llm.job.state": name})
    workflow.logger.info("pipeline ended", extra={"state": llm_pb2.JobState.Name(final)})


def record_step(pipeline: pipeline_pb2.PipelineRequest, final: "pipeline_pb2.StepState.ValueType") -> None:
    """Count that a step of a pipeline has ended, with its final state."""
    ended = workflow.metric_meter().create_counter(
        "llm.pipeline.steps", "Steps of pipelines that have ended, by the pipeline's name.", "{step}"
    )
    for state in ENDED_STEPS:
        name = pipeline_pb2.StepState.Name(state).removeprefix("STEP_STATE_").lower()
        ended.add(int(state == final), {"llm.pipeline": _label(pipeline), "llm.step.state": name})


def _label(pipeline: pipeline_pb2.PipelineRequest) -> str:
    name = name_of(pipeline)
    return name if name in REGISTERED else _UNKNOWN
