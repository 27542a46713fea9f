"""How a job stands and ended, in the words of OpenAI's API."""

from http import HTTPStatus
from typing import Any, Final, NamedTuple

from jobs.errors import InvalidJob, PromptTooLong, QueueTimeout, UnknownModel, UnsupportedParams, reason_of
from llm_pb import llm_pb2
from openai_api.errors import error_object

FINAL_STATES: Final = {
    llm_pb2.JOB_STATE_SUCCEEDED: "completed",
    llm_pb2.JOB_STATE_FAILED: "failed",
    llm_pb2.JOB_STATE_TIMED_OUT: "failed",
    llm_pb2.JOB_STATE_CANCELLED: "cancelled",
}
"""The status of a response by the final state of its job. A job that reached its max_tokens is `incomplete`."""

_REFUSED: Final = {error.reason for error in (InvalidJob, PromptTooLong, UnknownModel, UnsupportedParams)}
"""The reasons of errors of jobs for which their sender must change them."""


class Ending(NamedTuple):
    """How a job ended."""

    status: llm_pb2.JobStatus
    result: llm_pb2.JobResult


def response_status(status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> str:
    """Return the status of a response."""
    if status.state == llm_pb2.JOB_STATE_SUCCEEDED and result.finish_reason == llm_pb2.FINISH_REASON_LENGTH:
        return "incomplete"
    started = status.state in (llm_pb2.JOB_STATE_RUNNING, llm_pb2.JOB_STATE_NOTIFYING)
    return FINAL_STATES.get(status.state, "in_progress" if started else "queued")


def response_error(status: llm_pb2.JobStatus) -> dict[str, Any] | None:
    """Return the error of a response; None unless its job has failed."""
    if FINAL_STATES.get(status.state) != "failed":
        return None
    code = "invalid_prompt" if _reason(status) in _REFUSED else "server_error"
    return {"code": code, "message": status.error.message}


def finish_reason(result: llm_pb2.JobResult) -> str:
    """Return why the answer of a job that succeeded ended, for a choice of a completion."""
    return "length" if result.finish_reason == llm_pb2.FINISH_REASON_LENGTH else "stop"


def failed_completion(ending: Ending) -> tuple[HTTPStatus, dict[str, Any]] | None:
    """Return status and error object of a completion whose job did not succeed; None if it did."""
    if ending.status.state == llm_pb2.JOB_STATE_SUCCEEDED:
        return None
    reason = _reason(ending.status)
    http_status = HTTPStatus.INTERNAL_SERVER_ERROR
    if reason in _REFUSED:
        http_status = HTTPStatus.BAD_REQUEST
    elif reason == QueueTimeout.reason:
        http_status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "context_length_exceeded" if reason == PromptTooLong.reason else reason.lower() or None
    return http_status, error_object(ending.status.error.message or "the job has failed", http_status, code)


def completion_usage(result: llm_pb2.JobResult) -> dict[str, Any]:
    """Return what a completion used, in tokens."""
    prompt, output = result.metadata.prompt_tokens, result.metadata.output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": result.metadata.cached_prompt_tokens},
    }


def response_usage(result: llm_pb2.JobResult) -> dict[str, Any]:
    """Return what a response used, in tokens."""
    prompt, output = result.metadata.prompt_tokens, result.metadata.output_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": result.metadata.cached_prompt_tokens, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }


def _reason(status: llm_pb2.JobStatus) -> str:
    return reason_of(status.error)
