"""Addresses and example commands for a running stack, ready to be pasted."""

import json
import shlex
import sys
from pathlib import Path
from typing import Final

from deploy.local.ports import HOST
from deploy.local.stack import Stack

_OPENAI: Final = """
from openai import OpenAI
client = OpenAI(base_url="{url}", api_key="{key}")
for event in client.responses.create(
    model="{model}", input="Return the ", max_output_tokens=64, background=True, stream=True
):
    print(getattr(event, "delta", ""), end="", flush=True)
"""


def hints(stack: Stack, model: str, *, credential: bool = False) -> str:
    """Return the addresses of the stack and example commands, as text for a terminal.

    `credential`: whether the gateway asks its callers for one.
    """
    gateway = stack.address("gateway")
    rpc = "llm.v1.LlmService"
    user, request, prompt = "alice", "first", "Return the "
    job = {"user_id": user, "request_id": request, "model": model, "prompt": prompt, "params": {"max_tokens": 64}}
    workflow_id = f"llmjob-{user}-{request}"
    submit = shlex.quote(json.dumps({"job": job}))
    watch = shlex.quote(json.dumps({"workflow_id": workflow_id}))
    if stack.ca is None:
        grpcurl, scheme, trust, curl = "grpcurl -plaintext", "http", "", "curl"
        buf_curl = f"{_tool('buf')} curl --protocol grpc --http2-prior-knowledge"
    else:
        ca, scheme = _short(stack.ca), "https"
        grpcurl, trust, curl = f"grpcurl -cacert {ca}", f"SSL_CERT_FILE={ca} ", f"curl --cacert {ca}"
        buf_curl = f"{_tool('buf')} curl --protocol grpc --cacert {ca}"
    http = f"{scheme}://{stack.address('http')}"
    response = shlex.quote(json.dumps({"model": model, "input": prompt, "max_output_tokens": 64, "stream": True}))
    openai = shlex.quote(_OPENAI.format(url=f"{http}/v1", key="<credential>" if credential else "none", model=model))
    codec_auth = ""
    if credential:
        bearer = shlex.quote("authorization: Bearer <credential>")
        grpcurl, curl, buf_curl = f"{grpcurl} -H {bearer}", f"{curl} -H {bearer}", f"{buf_curl} --header {bearer}"
        codec_auth = " --codec-auth 'Bearer <credential of an operator>'"
    return f"""
  console     {http}/console/
  Web UI      {stack.web_ui}
  gateway     {gateway}
  HTTP        {http}/jobs, and OpenAI's API at {http}/v1: see docs/http.md, docs/openai.md
  logs        {_short(stack.state_dir / "logs")}
  metrics     {stack.metrics_url("gateway")} and more: see docs/observe.md

Submit a job and watch it, with grpcurl or with buf:

  {grpcurl} -d {submit} {gateway} {rpc}/Submit
  {grpcurl} -d {watch} {gateway} {rpc}/StreamStatus

  {buf_curl} --data {submit} {scheme}://{gateway}/{rpc}/Submit
  {buf_curl} --data {watch} {scheme}://{gateway}/{rpc}/StreamStatus

Or over HTTP, with curl or with OpenAI's client (`pip install openai`):

  {curl} -N -H 'content-type: application/json' -d {response} {http}/v1/responses

  {trust}python -c {openai}

Look at it from Temporal's side:

  {trust}{_tool("temporal")} workflow show --address {stack.address("temporal")} \
--codec-endpoint {scheme}://{HOST}:{stack.ports.codec}{codec_auth} --workflow-id {workflow_id}
"""


def _tool(name: str) -> str:
    return _short(Path(sys.executable).with_name(name))


def _short(path: Path) -> str:
    """Return the path as a person in the current folder would write it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
