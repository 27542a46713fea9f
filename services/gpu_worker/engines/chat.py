"""Conversion of a job's prompt to tokens, with the model's own tokenizer and chat template."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from jobs.errors import InvalidJob, PromptTooLong, UnsupportedParams
from jobs.tokenizer import WHY_NOT_SPECIAL, SpecialTokens, longest_token
from llm_pb import llm_pb2

ROLE_NAMES: Final = {
    llm_pb2.ROLE_SYSTEM: "system",
    llm_pb2.ROLE_USER: "user",
    llm_pb2.ROLE_ASSISTANT: "assistant",
}
"""The names of the roles in chat templates."""


class PromptEncoder:
    """Turns jobs into token ids for one model."""

    def __init__(self, tokenizer: Any, context_tokens: int, special_tokens_in_messages: bool) -> None:
        """`tokenizer` is a transformers one. Takes up to a second, so call it in a thread."""
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        # Tokenizers written in Python have no backend.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._longest = None if backend is None else longest_token(backend)
        self._special = None
        if not special_tokens_in_messages:
            named = getattr(tokenizer, "all_special_tokens", ())
            self._special = SpecialTokens(named) if backend is None else SpecialTokens.of(backend)

    def ids(self, job: llm_pb2.JobRequest) -> list[int]:
        """Return the job's prompt, or its messages as the model's chat template renders them, as token ids.

        Slow for a long prompt, so call it in a thread. Raises PromptTooLong, UnsupportedParams for messages that the
        template cannot render, InvalidJob for a prompt without tokens or a message that holds a special token.
        """
        ids = self._chat_ids(job.messages) if job.messages else self._text_ids(job.prompt)
        if not ids:
            raise InvalidJob("prompt: holds no token for this model; send some text")
        check_room(len(ids), self._context_tokens)
        return list(ids)

    def _text_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self._check_size(text)
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _chat_ids(self, messages: Sequence[llm_pb2.ChatMessage]) -> list[int]:
        """Return the token ids of a conversation, up to where the model's answer begins."""
        # Not installed with the simulated engine, which also uses this module.
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise UnsupportedParams("messages: this model has no chat template; send a prompt instead")
        for index, message in enumerate(messages):
            if self._special is not None and (token := self._special.first_in(message.content)) is not None:
                raise InvalidJob(f"messages[{index}].content: must not hold {token}: {WHY_NOT_SPECIAL}")
        turns = [{"role": ROLE_NAMES[message.role], "content": message.content} for message in messages]
        render = partial(self._tokenizer.apply_chat_template, turns, add_generation_prompt=True)
        try:
            if self._longest is None:
                ids: list[int] = render(return_dict=False)
                return ids
            text = render(tokenize=False)
        except TemplateError as error:
            raise UnsupportedParams(f"messages: the model's chat template refuses them: {error}") from error
        # A template may leave out parts of a message, so only the rendered text shows the size.
        return self._text_ids(text, add_special_tokens=False)

    def _check_size(self, text: str) -> None:
        """Raise PromptTooLong for a text that cannot fit, whatever its tokens are. Tokenising it would take long."""
        if self._longest is None:
            return
        size, limit = len(text.encode()), self._context_tokens * self._longest
        if size >= limit:
            raise PromptTooLong(
                f"prompt: {size} bytes leave no room in a context of {self._context_tokens} tokens, each of at most "
                f"{self._longest} bytes; shorten it"
            )


def check_room(prompt_tokens: int, context_tokens: int) -> None:
    """Raise PromptTooLong unless a prompt of this many tokens leaves room for one more."""
    if prompt_tokens >= context_tokens:
        raise PromptTooLong(
            f"prompt: {prompt_tokens} tokens leave no room in a context of {context_tokens}; shorten it to at most "
            f"{context_tokens - 1}"
        )
