"""The endpoints whose requests are jobs, by path: how a body is read, and which object answers it."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from llm_pb import llm_pb2
from openai_api.asked import Asked
from openai_api.chat_request import read_chat_request, read_completion_request
from openai_api.completions import ChatCompletion, Completion, TextCompletion
from openai_api.outcome import Ending
from openai_api.response_object import response_object
from openai_api.responses_request import read_responses_request

READERS: Final[Mapping[str, Callable[[object], Asked]]] = {
    "/v1/chat/completions": read_chat_request,
    "/v1/responses": read_responses_request,
    "/v1/completions": read_completion_request,
}
"""What reads the body of a request."""
COMPLETIONS: Final[Mapping[str, type[Completion]]] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": TextCompletion,
}
"""The completion that answers a request; any other is answered by a response."""


def answer_object(path: str, job: llm_pb2.JobRequest, ending: Ending) -> dict[str, Any]:
    """Return the object that answers a request whose job has ended.

    Of a job that did not succeed it holds the partial output: a completion's `finish_reason` is null then.
    """
    if path not in COMPLETIONS:
        return response_object(job, ending.status, ending.result)
    completion = COMPLETIONS[path](job, ending.status).object(ending)
    if ending.status.state != llm_pb2.JOB_STATE_SUCCEEDED:
        completion["choices"][0]["finish_reason"] = None
    return completion
