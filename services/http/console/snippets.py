"""The call that submits a job, for people who want to make it themselves."""

import json
import shlex
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from starlette.requests import Request

from llm_pb import llm_pb2
from services.http.console.openai_snippet import openai_snippet

_MAX: Final = 4000
"""Maximum number of characters of a text in a snippet."""


def snippets(
    job: llm_pb2.JobRequest, base: str, gateway: str, *, tls: bool = False, credential: bool = False
) -> Mapping[str, str]:
    """Return the calls by the name of their client.

    `base` is the URL of the front, `gateway` the address of the gateway, `tls` whether the gateway has TLS, and
    `credential` whether a call needs a credential. A text of more than 4000 characters is left out: the call says so.
    """
    job = _shortened(job)
    value = json_format.MessageToDict(job, preserving_proto_field_name=True)
    command = json.dumps({"job": value}, ensure_ascii=False)
    connection = '-cacert "$LLM_CA" ' if tls else "-plaintext "
    return {
        "curl": curl_call(job, base, credential=credential),
        "grpcurl": f"grpcurl {connection}{_header(credential=credential)}-d {shlex.quote(command)} "
        f"{shlex.quote(gateway)} llm.v1.LlmService/Submit",
        "Python": _python(job, gateway, tls=tls, credential=credential),
        "OpenAI": openai_snippet(job, base, credential=credential),
    }


def base_of(request: Request) -> str:
    """Return the URL by which the caller reaches the front."""
    return str(request.base_url).rstrip("/")


def curl_call(job: llm_pb2.JobRequest, base: str, *, credential: bool) -> str:
    """Return the call of curl. The arguments are those of snippets()."""
    text = json.dumps(json_format.MessageToDict(job, preserving_proto_field_name=True), ensure_ascii=False, indent=2)
    return curl_post(f"{base}/jobs", text, credential=credential)


def curl_post(url: str, text: str, *, credential: bool) -> str:
    """Return the call of curl that posts JSON."""
    return (
        f"curl --fail-with-body -s {shlex.quote(url)} {_header(credential=credential)}"
        f"-H 'Content-Type: application/json' --data {shlex.quote(text)}"
    )


def _header(*, credential: bool) -> str:
    return '-H "Authorization: Bearer $LLM_CREDENTIAL" ' if credential else ""


def _shortened(job: llm_pb2.JobRequest) -> llm_pb2.JobRequest:
    short = llm_pb2.JobRequest()
    short.CopyFrom(job)
    if len(short.prompt) > _MAX:
        short.prompt = _left_out(short.prompt)
    for message in short.messages:
        if len(message.content) > _MAX:
            message.content = _left_out(message.content)
    return short


def _left_out(text: str) -> str:
    return f"… {len(text)} characters, left out here …"


def _python(job: llm_pb2.JobRequest, gateway: str, *, tls: bool, credential: bool) -> str:
    modules = [*(["import os"] if tls or credential else []), *(["from pathlib import Path"] if tls else [])]
    others = [*(["import grpc"] if tls else []), "from durable_llm import Client"]
    imports = "\n\n".join("\n".join(block) for block in (modules, others) if block)
    arguments = [repr(gateway)]
    if tls:
        arguments.append('credentials=grpc.ssl_channel_credentials(Path(os.environ["LLM_CA"]).read_bytes())')
    if credential:
        arguments.append('metadata={"authorization": "Bearer " + os.environ["LLM_CREDENTIAL"]}')
    fields = "".join(f"        {name}={value!r},\n" for name, value in _python_values(job).items())
    return (
        f"{imports}\n\nwith Client({', '.join(arguments)}) as client:\n    job = client.submit(\n{fields}    )\n"
        '    for piece in job.stream():\n        print(piece.text, end="", flush=True)'
    )


def _python_values(message: Message) -> Mapping[str, Any]:
    """Return the fields that are set, as the constructor of the message takes them."""
    return {field.name: _python_value(field, value) for field, value in message.ListFields()}


def _python_value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_single_value(field, item) for item in value]
    return _single_value(field, value)


def _single_value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return _python_values(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    return value
