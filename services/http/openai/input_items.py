"""The items of a response's input."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

from llm_pb import llm_pb2
from openai_api.asked import Note
from openai_api.response_object import item_id
from services.http.failures import Failure

_ROLES: Final = {
    llm_pb2.ROLE_SYSTEM: "system",
    llm_pb2.ROLE_USER: "user",
    llm_pb2.ROLE_ASSISTANT: "assistant",
}


def input_items(job: llm_pb2.JobRequest, status: llm_pb2.JobStatus) -> list[dict[str, Any]]:
    """Return the items of a job's input, in order. The instructions are none of them."""
    messages = list(job.messages) or [llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content=job.prompt)]
    if Note.of(job.labels).instructions:
        del messages[0]
    return [_item(message, f"{item_id(status)}.{index}") for index, message in enumerate(messages)]


def page_of(items: Sequence[dict[str, Any]], after: str, limit: int) -> dict[str, Any]:
    """Return at most `limit` items as a list object: those after the item with an id. Raises Failure without one."""
    start = 0
    if after:
        start = 1 + next((index for index, item in enumerate(items) if item["id"] == after), len(items))
        if start > len(items):
            raise Failure(HTTPStatus.BAD_REQUEST, f"there is no item {after!r}", "ITEM_NOT_FOUND")
    page = list(items[start : start + limit])
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _item(message: llm_pb2.ChatMessage, id_: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "input_text", "text": message.content}
    if message.role == llm_pb2.ROLE_ASSISTANT:
        part = {"type": "output_text", "text": message.content, "annotations": [], "logprobs": []}
    role = _ROLES.get(message.role, "user")
    return {"id": id_, "type": "message", "role": role, "status": "completed", "content": [part]}
