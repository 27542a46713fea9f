"""The messages of a conversation, as OpenAI's endpoints take them."""

from collections.abc import Collection
from typing import Final

from llm_pb import llm_pb2
from openai_api.errors import invalid, unsupported
from openai_api.parameters import Parameters, list_of, required, text_of

ROLES: Final = {
    "system": llm_pb2.ROLE_SYSTEM,
    "developer": llm_pb2.ROLE_SYSTEM,
    "user": llm_pb2.ROLE_USER,
    "assistant": llm_pb2.ROLE_ASSISTANT,
}
_NO_EFFECT: Final = {"id", "status", "phase"}
"""Members of an output item that a client sends back as input."""


def message_of(value: object, path: str, kinds: Collection[str]) -> llm_pb2.ChatMessage:
    """Return a message. Its content is a text, or parts of text of these `kinds`, which become its lines.

    Raises InvalidBody for anything else.
    """
    message = Parameters(value, path)
    message.allow("type", "message")
    role = required(message.text("role"), f"{path}.role")
    if role not in ROLES:
        raise unsupported(f"{path}.role", f"it is {role!r}")
    for name in _NO_EFFECT:
        message.any(name)
    # What clients send back of an answer without tools and refusals.
    message.allow("tool_calls", [])
    message.allow("annotations", [])
    content = required(message.any("content"), f"{path}.content")
    message.require_all_taken()
    return llm_pb2.ChatMessage(role=ROLES[role], content=_content(content, f"{path}.content", kinds))


def _content(content: object, path: str, kinds: Collection[str]) -> str:
    if isinstance(content, str):
        return text_of(content, path)
    parts = []
    for index, item in enumerate(list_of(content, path)):
        part = Parameters(item, f"{path}[{index}]")
        kind = part.text("type")
        if kind not in kinds:
            raise unsupported(part.path("type"), f"it is {kind!r}")
        parts.append(required(part.text("text"), part.path("text")))
        # An answer's part that is sent back as input.
        part.allow("annotations", [])
        part.any("logprobs")
        part.require_all_taken()
    if not parts:
        raise invalid(path, "must not be empty")
    return "\n".join(parts)
