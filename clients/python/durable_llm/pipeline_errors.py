"""Errors of pipelines. They belong to the tree of durable_llm.errors.

ApiError
├── PipelineNotFound  no pipeline has this id, or it is past its retention
├── StepNotFound      the pipeline has no such step
├── StepNotWaiting    the step does not wait for an answer
└── StepAnswered      the step has got another answer
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


PIPELINE_ERRORS: Final[Mapping[str, type[ApiError]]] = {
    error.reason: error for error in (PipelineNotFound, StepNotFound, StepNotWaiting, StepAnswered)
}
"""The class for each reason."""
