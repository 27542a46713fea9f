"""The call that submits a job by OpenAI's client."""

from typing import Any, Final

from google.protobuf import json_format

from llm_pb import common_pb2, llm_pb2
from openai_api.asked import CLASS_OF_TIER, MAX_METADATA, NOTE_LABEL, tier_of
from openai_api.responses_request import LOGPROBS

_ROLES: Final = {llm_pb2.ROLE_SYSTEM: "system", llm_pb2.ROLE_USER: "user", llm_pb2.ROLE_ASSISTANT: "assistant"}
_STRUCTURED: Final = {"json_schema": "json", "regex": "regex", "choice": "choice"}
"""The members of `structured_outputs` by their field."""
_NO_PARAMETER: Final = ("project_id", "timeouts", "notify_options", "cancel_if_unwatched", "cache")
"""Fields of a job that OpenAI's API has no parameter for."""


def openai_snippet(job: llm_pb2.JobRequest, base: str, *, credential: bool) -> str:
    """Return the call: a completion for a prompt, a chat completion for a conversation.

    A comment in the call names the fields that the API has no parameter for. `base` is the URL of the front,
    `credential` says whether a call needs one.
    """
    key = 'os.environ["LLM_CREDENTIAL"]' if credential else '"none"'
    arguments: dict[str, Any] = {"model": job.model, "user": job.user_id}
    if job.messages:
        call, shown = "responses.create", 'event.type == "response.output_text.delta"'
        text, names = "event.delta", {"max_tokens": "max_output_tokens"}
        arguments["input"] = [
            {"role": _ROLES.get(message.role, "user"), "content": message.content} for message in job.messages
        ]
        arguments["background"] = True
        if job.params.HasField("logprobs"):
            arguments["include"] = [LOGPROBS]
            names["logprobs"] = "top_logprobs"
    else:
        call, shown, text, names = "completions.create", "event.choices", "event.choices[0].text", {}
        arguments["prompt"] = job.prompt
    arguments["stream"] = True
    more: dict[str, Any] = {}
    for field, value in job.params.ListFields():
        if field.name in _STRUCTURED:
            content = list(value.options) if field.name == "choice" else value
            more["structured_outputs"] = {_STRUCTURED[field.name]: content}
        else:
            more[names.get(field.name, field.name)] = list(value) if field.is_repeated else value
    given_fields = {field.name for field, _ in job.ListFields()}
    left_out: list[str] = [name for name in _NO_PARAMETER if name in given_fields]
    labels = {name: value for name, value in job.labels.items() if name != NOTE_LABEL}
    if len(labels) > MAX_METADATA:
        left_out.append("labels")
    elif labels:
        more["metadata"] = labels
    if job.job_class in CLASS_OF_TIER.values():
        more["service_tier"] = tier_of(job)
    elif job.job_class == common_pb2.JOB_CLASS_SCHEDULED:
        left_out.append("job_class")
    if job.priority not in (0, 3):
        left_out.append("priority")
    if job.notify:
        value = json_format.MessageToDict(job, preserving_proto_field_name=True)
        more["durable_llm"] = {"notify": value["notify"]}
    given = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    given += f"    extra_body={more!r},\n" if more else ""
    note = f"# OpenAI's API has no parameter for {', '.join(left_out)}.\n" if left_out else ""
    imports = "import os\n\n" if credential else ""
    return (
        f"{imports}from openai import OpenAI\n\n"
        f"client = OpenAI(base_url={base + '/v1'!r}, api_key={key})\n{note}"
        f"stream = client.{call}(\n{given})\n"
        f'for event in stream:\n    if {shown}:\n        print({text}, end="", flush=True)'
    )
