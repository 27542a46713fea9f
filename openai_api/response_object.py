"""The object `response` of OpenAI's API, made of a job alone."""

import json
from typing import Any

from jobs.response_ids import response_id
from llm_pb import llm_pb2
from openai_api.asked import NOTE_LABEL, Note, tier_of
from openai_api.logprobs import logprobs_of
from openai_api.outcome import FINAL_STATES, response_error, response_status, response_usage
from openai_api.sampling import JSON_OBJECT


def response_object(
    job: llm_pb2.JobRequest, status: llm_pb2.JobStatus, result: llm_pb2.JobResult | None = None
) -> dict[str, Any]:
    """Return the response of a job. It has output and usage once the job has ended."""
    ended = status.state in FINAL_STATES
    result = result if ended and result is not None else llm_pb2.JobResult()
    word = response_status(status, result)
    note, params = Note.of(job.labels), job.params
    return {
        "id": response_id(status.workflow_id),
        "object": "response",
        "created_at": status.create_time.seconds,
        "completed_at": status.end_time.seconds if word == "completed" else None,
        "status": word,
        "background": note.background,
        "error": response_error(status),
        "incomplete_details": {"reason": "max_output_tokens"} if word == "incomplete" else None,
        "instructions": job.messages[0].content if note.instructions and job.messages else None,
        "max_output_tokens": params.max_tokens if params.HasField("max_tokens") else None,
        "metadata": {key: value for key, value in sorted(job.labels.items()) if key != NOTE_LABEL},
        "model": job.model,
        "output": [message_item(status, result)] if has_item(word, result.output) else [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "service_tier": tier_of(job),
        "temperature": params.temperature if params.HasField("temperature") else None,
        "text": {"format": _format(params, note)},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": params.logprobs,
        "top_p": params.top_p if params.HasField("top_p") else None,
        "truncation": "disabled",
        "usage": response_usage(result) if result.HasField("metadata") else None,
        "user": job.user_id,
    }


def has_item(word: str, output: str) -> bool:
    """Return whether a response of this status has an item of output. One that ended early without text has none."""
    return bool(output) or word in ("completed", "incomplete")


def item_id(status: llm_pb2.JobStatus) -> str:
    """Return the id of the response's one item."""
    return response_id(status.workflow_id).replace("resp_", "msg_", 1)


def message_item(status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> dict[str, Any]:
    """Return the item of output of a response that has ended."""
    return {
        "id": item_id(status),
        "type": "message",
        "role": "assistant",
        "status": "completed" if response_status(status, result) == "completed" else "incomplete",
        "content": [text_part(result)],
    }


def text_part(result: llm_pb2.JobResult) -> dict[str, Any]:
    """Return the content of the item."""
    logprobs = logprobs_of(result.logprobs)
    return {"type": "output_text", "text": result.output, "annotations": [], "logprobs": logprobs}


def _format(params: llm_pb2.SamplingParams, note: Note) -> dict[str, Any]:
    if not params.HasField("json_schema"):
        return {"type": "text"}
    if params.json_schema == JSON_OBJECT and not note.format_name:
        return {"type": "json_object"}
    try:
        schema = json.loads(params.json_schema)
    except ValueError:
        schema = {}
    return {"type": "json_schema", "name": note.format_name or "schema", "schema": schema, "strict": True}
