"""The outcome of a job or batch as an event of OpenAI's API, for webhooks: WEBHOOK_FORMAT_OPENAI of llm.proto."""

from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from jobs.response_ids import response_id
from services.notifier.event import CloudEvent

_TYPES: Final = {
    "llm.v1.job.succeeded": "response.completed",
    "llm.v1.job.cancelled": "response.cancelled",
    "llm.v1.job.failed": "response.failed",
    "llm.v1.job.timed_out": "response.failed",
    "llm.v1.batch.succeeded": "batch.completed",
    "llm.v1.batch.cancelled": "batch.cancelled",
    "llm.v1.batch.failed": "batch.failed",
    "llm.v1.batch.expired": "batch.expired",
}
"""OpenAI's type of an outcome, by that of the CloudEvent. OpenAI has none for a job that timed out."""


def to_openai_event(event: CloudEvent) -> dict[str, Any]:
    """Return the event that OpenAI's clients expect of an outcome. Its id is the same in every attempt."""
    type_ = _TYPES[event["type"]]
    if type_ == "response.completed" and event["data"]["result"]["finishReason"] == "FINISH_REASON_LENGTH":
        type_ = "response.incomplete"
    ended = Timestamp()
    ended.FromJsonString(event["time"])
    return {
        "id": f"evt_{event['id']}",
        "object": "event",
        "type": type_,
        "created_at": ended.seconds,
        # A batch has one id everywhere.
        "data": {"id": event["subject"] if type_.startswith("batch.") else response_id(event["subject"])},
    }
