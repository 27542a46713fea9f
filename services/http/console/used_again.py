"""A job in the form of the playground, and the fields that the form has no place for."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from durable_llm._enums import name_of
from jobs.classes import class_of
from llm_pb import common_pb2, llm_pb2

NUMBERS: Final = ("temperature", "top_p", "top_k", "max_tokens", "seed")
"""The parameters that are number fields of the form."""
_FIELDS: Final = ("user_id", "request_id", "model", "prompt", "messages", "params", "project_id", "job_class")
"""The fields of a job that the form holds or sets anyway."""


class UsedAgain(NamedTuple):
    """A job in the form of the playground."""

    form: Mapping[str, str]
    left_out: Sequence[str]
    """The fields of the job that are not in the form."""
    messages: int
    """The number of messages that are not in the form."""


def use_again(job: llm_pb2.JobRequest) -> UsedAgain:
    """Return a job in the form. Of a conversation it holds the system message at the beginning, and the last message of
    the user.
    """
    form = {"user_id": job.user_id, "model": job.model, "project_id": job.project_id, "text": job.prompt}
    form["kind"] = "chat" if job.messages else "prompt"
    if class_of(job) != common_pb2.JOB_CLASS_STANDARD:
        form["job_class"] = name_of(common_pb2.JobClass, job.job_class)
    held = 0
    if job.messages and job.messages[0].role == llm_pb2.ROLE_SYSTEM:
        form["system"] = job.messages[0].content
        held += 1
    if asked := [message.content for message in job.messages if message.role == llm_pb2.ROLE_USER]:
        form["text"] = asked[-1]
        held += 1
    left_out = [field.name for field, _ in job.ListFields() if field.name not in _FIELDS]
    for field, value in job.params.ListFields():
        if field.name in NUMBERS:
            # Another text would be another number.
            form[field.name] = repr(value)
        elif field.name == "stop" and not any("\n" in text or "\r" in text for text in value):
            form["stop"] = "\n".join(value)
        else:
            left_out.append(field.name)
    return UsedAgain(form, left_out, len(job.messages) - held)
