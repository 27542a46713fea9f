"""The small model's special tokens and the form of a chat, for its training data and as its chat template."""

from collections.abc import Iterable
from typing import Final

END_OF_TEXT: Final = "<|endoftext|>"
"""Token that ends a document. It is the model's end-of-sequence and padding token."""
END_OF_TURN: Final = "<|end|>"
"""Token that ends a turn of a chat, and therefore an answer."""
ROLES: Final = ("system", "user", "assistant")
SPECIAL: Final = [END_OF_TEXT, END_OF_TURN, *(f"<|{role}|>" for role in ROLES)]
"""All special tokens in the order of their ids, which begin at 0."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}" + END_OF_TURN + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Jinja template with which transformers and vllm render `messages`."""


def chat(turns: Iterable[tuple[str, str]]) -> str:
    """Return turns of (role, content) as CHAT_TEMPLATE renders them."""
    return "".join(f"<|{role}|>\n{content}{END_OF_TURN}\n" for role, content in turns)
