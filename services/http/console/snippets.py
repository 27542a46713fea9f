"""The call that submits a job, for people who want to make it themselves."""

import json
import shlex
from typing import Any, Final

from google.protobuf import json_format

from llm_pb import llm_pb2

_MAX: Final = 4000
"""Maximum number of characters of a text in a snippet."""
_ROLES: Final = {llm_pb2.ROLE_SYSTEM: "system", llm_pb2.ROLE_USER: "user", llm_pb2.ROLE_ASSISTANT: "assistant"}


def snippets(job: llm_pb2.JobRequest, base: str, gateway: str, *, tls: bool) -> dict[str, str]:
    """Return the calls by the name of their client.

    `base` is the URL of the front, `gateway` the address of the gateway. A prompt of more than 4000 characters is left
    out: the call says so.
    """
    value = _shortened(job)
    text = json.dumps(value, ensure_ascii=False, indent=2)
    command = json.dumps({"job": value}, ensure_ascii=False)
    plain = "" if tls else "-plaintext "
    return {
        "curl": f"curl --fail-with-body -s {shlex.quote(f'{base}/jobs')} "
        f"-H 'Content-Type: application/json' --data {shlex.quote(text)}",
        "grpcurl": f"grpcurl {plain}-d {shlex.quote(command)} {shlex.quote(gateway)} llm.v1.LlmService/Submit",
        "Python": _python(value, gateway),
        "OpenAI": _openai(job, value, base),
    }


def _shortened(job: llm_pb2.JobRequest) -> dict[str, Any]:
    value: dict[str, Any] = json_format.MessageToDict(job, preserving_proto_field_name=True)
    for holder, name in ((value, "prompt"), *((message, "content") for message in value.get("messages", ()))):
        if len(holder.get(name, "")) > _MAX:
            holder[name] = f"… {len(holder[name])} characters, left out here …"
    return value


def _python(value: dict[str, Any], gateway: str) -> str:
    fields = "".join(f"        {name}={content!r},\n" for name, content in value.items())
    return (
        "from durable_llm import Client\n\n"
        f"with Client({gateway!r}) as client:\n    job = client.submit(\n{fields}    )\n"
        '    for piece in job.stream():\n        print(piece.text, end="", flush=True)'
    )


def _openai(job: llm_pb2.JobRequest, value: dict[str, Any], base: str) -> str:
    asked: Any = value.get("prompt", "")
    if job.messages:
        asked = [
            {"role": _ROLES.get(message.role, "user"), "content": shown["content"]}
            for message, shown in zip(job.messages, value["messages"], strict=True)
        ]
    options = {"temperature": "temperature", "top_p": "top_p", "max_tokens": "max_output_tokens"}
    given = {field.name: content for field, content in job.params.ListFields()}
    more = "".join(f", {theirs}={given[ours]!r}" for ours, theirs in options.items() if ours in given)
    return (
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url={base + "/v1"!r}, api_key="none")\n'
        f"stream = client.responses.create(\n    model={job.model!r}, input={asked!r}{more},\n"
        "    background=True, stream=True,\n)\n"
        "for event in stream:\n"
        '    if event.type == "response.output_text.delta":\n        print(event.delta, end="", flush=True)'
    )
