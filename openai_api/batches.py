"""A batch as OpenAI's API has it: the body that creates one, and its object."""

import json
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from google.rpc import error_details_pb2

from jobs.errors import reason_of
from llm_pb import batch_pb2
from openai_api.asked import MAX_METADATA, NOTE_LABEL
from openai_api.endpoints import READERS
from openai_api.errors import invalid, unsupported
from openai_api.parameters import text_of

_WINDOW: Final = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_UNITS: Final = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
_KNOWN: Final = frozenset({"input_file_id", "endpoint", "completion_window", "metadata"})
_LINE: Final = re.compile(r"lines\[(\d+)\]\.?")
_NAMED_LINE: Final = re.compile(r"lines\[(\d+)\]")
_STATUSES: Final = {
    batch_pb2.BATCH_STATE_VALIDATING: "validating",
    batch_pb2.BATCH_STATE_RUNNING: "in_progress",
    batch_pb2.BATCH_STATE_FINALIZING: "finalizing",
    batch_pb2.BATCH_STATE_SUCCEEDED: "completed",
    batch_pb2.BATCH_STATE_FAILED: "failed",
    batch_pb2.BATCH_STATE_CANCELLED: "cancelled",
    batch_pb2.BATCH_STATE_EXPIRED: "expired",
}
_OPEN: Final = frozenset(
    {batch_pb2.BATCH_STATE_VALIDATING, batch_pb2.BATCH_STATE_RUNNING, batch_pb2.BATCH_STATE_FINALIZING}
)


def read_batch(body: Mapping[str, Any]) -> batch_pb2.BatchRequest:
    """Return the batch that a body asks for, without user and request_id. Raises InvalidBody."""
    for name in body:
        if name not in _KNOWN:
            raise unsupported(name)
    texts = {name: body.get(name) for name in ("input_file_id", "endpoint", "completion_window")}
    for name, value in texts.items():
        if not isinstance(value, str) or not value:
            raise invalid(name, "is required: a text")
        text_of(value, name)
    endpoint, window = str(texts["endpoint"]), str(texts["completion_window"])
    if endpoint not in READERS:
        raise invalid("endpoint", f"must be one of {', '.join(READERS)}")
    if (found := _WINDOW.fullmatch(window)) is None:
        raise invalid("completion_window", "must be a number and m, h or d: 24h")
    batch = batch_pb2.BatchRequest()
    batch.input.file_id = str(texts["input_file_id"])
    batch.window.FromTimedelta(int(found[1]) * _UNITS[found[2]])
    batch.labels[NOTE_LABEL] = json.dumps({"endpoint": endpoint, "window": window}, separators=(",", ":"))
    metadata = body.get("metadata")
    if metadata is None:
        return batch
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        raise invalid("metadata", f"must be an object of at most {MAX_METADATA} pairs")
    for key, value in metadata.items():
        if key == NOTE_LABEL:
            raise invalid(f"metadata.{key}", "is reserved")
        batch.labels[key] = text_of(value, f"metadata.{key}")
    return batch


def batch_object(status: batch_pb2.BatchStatus) -> dict[str, Any]:
    """Return a batch as OpenAI has it."""
    note = _note(status.labels)
    state = _STATUSES.get(status.state, "failed")
    if status.cancel_requested and status.state in _OPEN:
        state = "cancelling"
    ended = status.end_time.seconds if status.HasField("end_time") else None
    counts, usage = status.counts, status.usage
    return {
        "id": status.batch_id,
        "object": "batch",
        "endpoint": note.get("endpoint", ""),
        "model": None,
        "errors": _errors(status),
        "input_file_id": status.input.file_id,
        "completion_window": note.get("window", ""),
        "status": state,
        "output_file_id": status.output.file_id or None,
        "error_file_id": status.errors.file_id or None,
        "created_at": status.create_time.seconds,
        "in_progress_at": status.start_time.seconds if status.HasField("start_time") else None,
        "expires_at": status.expire_time.seconds if status.HasField("expire_time") else None,
        "finalizing_at": None,
        "completed_at": ended if state == "completed" else None,
        "failed_at": ended if state == "failed" else None,
        "expired_at": ended if state == "expired" else None,
        "cancelling_at": None,
        "cancelled_at": ended if state == "cancelled" else None,
        "request_counts": {
            "total": counts.total,
            "completed": counts.succeeded,
            "failed": counts.failed + counts.cancelled + counts.expired,
        },
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
        },
        "metadata": {key: value for key, value in status.labels.items() if key != NOTE_LABEL} or None,
    }


def _note(labels: Mapping[str, str]) -> dict[str, str]:
    try:
        note = json.loads(labels.get(NOTE_LABEL, "{}"))
    except ValueError:
        return {}
    return {key: value for key, value in note.items() if isinstance(value, str)} if isinstance(note, dict) else {}


def _errors(status: batch_pb2.BatchStatus) -> dict[str, Any] | None:
    """Return why a batch failed: each bad field of a line, or else the one reason. OpenAI counts lines from 1."""
    if status.state != batch_pb2.BATCH_STATE_FAILED:
        return None
    bad = error_details_pb2.BadRequest()
    for detail in status.error.details:
        detail.Unpack(bad)
    code = reason_of(status.error).lower() or None
    found = []
    for violation in bad.field_violations:
        line = _LINE.match(violation.field)
        param = violation.field[line.end() :] if line else violation.field
        number = int(line[1]) + 1 if line else None
        found.append(
            {"code": code, "message": _from_one(violation.description), "param": param or None, "line": number}
        )
    found = found or [{"code": code, "message": status.error.message, "param": None, "line": None}]
    return {"object": "list", "data": found}


def _from_one(message: str) -> str:
    """Return a message in which lines are counted as in the member `line` next to it."""
    return _NAMED_LINE.sub(lambda named: f"line {int(named[1]) + 1}", message)
