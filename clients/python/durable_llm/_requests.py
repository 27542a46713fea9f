"""Jobs as the callers of the clients give them."""

import uuid
from collections.abc import Mapping
from typing import Any, Final

import grpc

from durable_llm.errors import InvalidRequest
from llm_pb import llm_pb2

_ROLES: Final = {"system": "ROLE_SYSTEM", "user": "ROLE_USER", "assistant": "ROLE_ASSISTANT"}


def read_job(job: llm_pb2.JobRequest | Mapping[str, Any]) -> llm_pb2.JobRequest | InvalidRequest:
    """Return a job of `map` as a JobRequest; the InvalidRequest of the service if the fields make no JobRequest."""
    if isinstance(job, llm_pb2.JobRequest):
        return job
    try:
        return job_request(None, dict(job))
    except (TypeError, ValueError) as error:
        invalid = InvalidRequest(f"this is no JobRequest: {error}", grpc.StatusCode.INVALID_ARGUMENT)
        invalid.__cause__ = error
        return invalid


def job_request(job: llm_pb2.JobRequest | None, fields: Mapping[str, Any]) -> llm_pb2.JobRequest:
    """Return the job with the fields in addition and with a request_id. Raises ValueError or TypeError like submit."""
    values = dict(fields)
    if messages := values.get("messages"):
        values["messages"] = [chat_message(message) for message in messages]
    request = llm_pb2.JobRequest(**values)
    if job is not None:
        base = llm_pb2.JobRequest()
        base.CopyFrom(job)
        base.MergeFrom(request)
        request = base
    if not request.request_id:
        request.request_id = uuid.uuid4().hex
    return request


def chat_message(message: Any) -> llm_pb2.ChatMessage:
    """Return a message of a job from one, or from a dict in OpenAI's form. Raises ValueError or TypeError."""
    if isinstance(message, Mapping):
        role = message.get("role")
        return llm_pb2.ChatMessage(**{**message, **({"role": _ROLES[role]} if role in _ROLES else {})})
    if not isinstance(message, llm_pb2.ChatMessage):
        raise TypeError(f"a message is a ChatMessage or a dict, not {type(message).__name__}")
    return message
