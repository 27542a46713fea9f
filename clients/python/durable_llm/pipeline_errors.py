"""Errors of pipelines. They belong to the tree of durable_llm.errors.

ApiError
├── PipelineNotFound  no pipeline has this id, or it is past its retention
├── StepNotFound      the pipeline has no such step
├── StepNotWaiting    the step does not wait for an answer
├── StepAnswered      the step has got another answer
└── PipelineResumed   the pipeline was submitted again while its earlier run was followed
"""

from collections.abc import Mapping
from typing import Final

from durable_llm.errors import ApiError


class PipelineNotFound(ApiError):
    """No pipeline has this id, or it is past its retention."""

    reason = "PIPELINE_NOT_FOUND"


class StepNotFound(ApiError):
    """The pipeline has no such step."""

    reason = "STEP_NOT_FOUND"


class StepNotWaiting(ApiError):
    """The step does not wait for an answer."""

    reason = "STEP_NOT_WAITING"


class StepAnswered(ApiError):
    """The step has got another answer."""

    reason = "STEP_ANSWERED"


class PipelineResumed(ApiError):
    """The pipeline was submitted again while its earlier run was followed: follow it again."""

    reason = "PIPELINE_RESUMED"


PIPELINE_ERRORS: Final[Mapping[str, type[ApiError]]] = {
    error.reason: error for error in (PipelineNotFound, StepNotFound, StepNotWaiting, StepAnswered, PipelineResumed)
}
"""The class for each reason."""
