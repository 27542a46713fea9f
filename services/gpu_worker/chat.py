"""From a job to the tokens of its prompt, with the model's own tokenizer and chat template."""

from typing import Any, Final

from jobs.errors import InvalidJob, PromptTooLong, UnsupportedParams
from llm_pb import llm_pb2

ROLE_NAMES: Final = {
    llm_pb2.ROLE_SYSTEM: "system",
    llm_pb2.ROLE_USER: "user",
    llm_pb2.ROLE_ASSISTANT: "assistant",
}
"""What chat templates call the roles."""


def prompt_ids(tokenizer: Any, job: llm_pb2.JobRequest, context_tokens: int) -> list[int]:
    """Return the job's prompt, or its messages as the model's chat template renders them, as token ids.

    `tokenizer` is a transformers one. Slow for a long prompt: not for the event loop. Raises PromptTooLong,
    UnsupportedParams for messages that the template cannot render, InvalidJob for a prompt without tokens.
    """
    ids = chat_ids(tokenizer, job.messages) if job.messages else tokenizer(job.prompt)["input_ids"]
    if not ids:
        raise InvalidJob("prompt: holds no token for this model; send some text")
    check_room(len(ids), context_tokens)
    return list(ids)


def chat_ids(tokenizer: Any, messages: Any) -> list[int]:
    """Return the token ids of a conversation, up to where the model's answer begins."""
    # Not installed beside the simulated engine, which shares this module.
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UnsupportedParams("messages: this model has no chat template; send a prompt instead")
    turns = [{"role": ROLE_NAMES[message.role], "content": message.content} for message in messages]
    try:
        ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise UnsupportedParams(f"messages: the model's chat template refuses them: {error}") from error
    return ids


def check_room(prompt_tokens: int, context_tokens: int) -> None:
    """Raise PromptTooLong unless a prompt of this many tokens leaves room for one more."""
    if prompt_tokens >= context_tokens:
        raise PromptTooLong(
            f"prompt: {prompt_tokens} tokens leave no room in a context of {context_tokens}; shorten it to at most "
            f"{context_tokens - 1}"
        )
