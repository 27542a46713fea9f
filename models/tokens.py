"""The small model's special tokens and the form of a chat: once for its training data, once as its chat template."""

from collections.abc import Iterable
from typing import Final

END_OF_TEXT: Final = "<|endoftext|>"
"""Ends a document; the model's end-of-sequence and padding token."""
END_OF_TURN: Final = "<|end|>"
"""Ends a turn of a chat, so also an answer."""
ROLES: Final = ("system", "user", "assistant")
SPECIAL: Final = [END_OF_TEXT, END_OF_TURN, *(f"<|{role}|>" for role in ROLES)]
"""All of them, in the order of their ids, from 0."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}" + END_OF_TURN + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""What transformers and vllm render `messages` with."""


def chat(turns: Iterable[tuple[str, str]]) -> str:
    """Return turns of (role, content) as CHAT_TEMPLATE renders them."""
    return "".join(f"<|{role}|>\n{content}{END_OF_TURN}\n" for role, content in turns)
