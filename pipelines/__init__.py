"""Durable programs made of jobs. An operator's own pipeline is a module that imports these names.

from pipelines import Pipeline, pipeline

@pipeline("haiku", StringValue, StringValue)
async def haiku(llm: Pipeline, topic: StringValue) -> StringValue: ...
"""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    # What is registered, and the errors that programs catch, are the process's: Temporal's sandbox must share them.
    from pipelines.errors import Incomplete, StepFailed
    from pipelines.program import Generated, Pipeline
    from pipelines.registry import pipeline

__all__ = ["Generated", "Incomplete", "Pipeline", "StepFailed", "pipeline"]
