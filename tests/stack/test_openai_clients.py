"""Clients of OpenAI's API, each unmodified and in an environment of its own, against two front processes.

`make test-clients` installs all of them. Otherwise those that are not installed are skipped, apart from OpenAI's own.

Each creates responses in the background, streams them and breaks off at a random event. OpenAI's clients and LiteLLM
resume and cancel them, too. The others have no call for that: OpenAI's Python client does it in their place, at another
front.
"""

import json
import re
import shutil
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

import openai
import pytest

from deploy.local.stack import Stack
from jobs.response_ids import workflow_id_of
from llm_pb import llm_pb2, llm_pb2_grpc
from tests.support.commands import missing, run
from tests.support.paths import ROOT

MODEL: Final = "docstrings"
CLIENTS: Final = ROOT / "tests" / "clients"
ENVIRONMENTS: Final = ROOT / ".tools" / "clients"
PREFIX: Final = re.compile(r"(resp_|chatcmpl-|cmpl-)")

FACTS: Final = {
    "openai-node": {
        "cancelled": "cancelled",
        "streamedTokens": 20,
        "tokens": 20,
        "refused": ["BadRequestError", "tools"],
        "input": ["Hi"],
    },
    "openai-2": {"cancelled": "cancelled", "tokens": 20},
    "ai-sdk": {
        "tokens": {"responses": [20, 20], "chat": [20, 20], "completion": [20, 20], "compatible": [20, 20]},
        "aborted": True,
    },
    "langchain": {"tokens": {"chat": [20, 20], "responses": [20, 20]}, "streamed": True},
    "llama-index": {"tokens": 20},
    "litellm": {"cancelled": "cancelled", "tokens": 20},
}
"""What each client reports of what it received, apart from the texts."""


class Fronts(NamedTuple):
    """The URLs of two front processes."""

    one: str
    other: str


@pytest.fixture(scope="module")
async def fronts(stack: Stack) -> AsyncIterator[Fronts]:
    other = stack.add("http")
    await other.start()
    await other.wait_ready()
    yield Fronts(*(f"http://{stack.address(name)}/v1" for name in ("http", other.name)))
    await other.terminate()


async def resumed(client: openai.AsyncOpenAI, id_: str, text: str) -> str:
    """Return the text of a response whose stream was left after `text`."""
    # A delta's number is 4 and the size of the output up to its end.
    stream = await client.responses.retrieve(id_, stream=True, starting_after=4 + len(text.encode()))
    async for event in stream:
        assert event.type != "error", event
        if event.type == "response.output_text.delta":
            text += event.delta
    return text


async def cancelled(client: openai.AsyncOpenAI, id_: str) -> str:
    """Cancel a response that has begun; return its text."""
    async with await client.responses.retrieve(id_, stream=True) as stream:
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
    ended = await client.responses.cancel(id_)
    assert ended.status == "cancelled"
    return ended.output_text


async def command_of(name: str) -> list[str]:
    """Return the command that runs a client. It skips the test of one that is not installed."""
    folder = CLIENTS / name
    if (folder / "check.py").exists():
        python = ENVIRONMENTS / name / "bin" / "python"
        if not (ENVIRONMENTS / name / ".installed").exists():
            pytest.skip(f"{name} is not installed: make test-clients")
        return [str(python), str(folder / "check.py")]
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        missing("Node.js with npm")
    if not (folder / "node_modules").exists():
        if name != "openai-node":
            pytest.skip(f"{name} is not installed: make test-clients")
        installed = await run(npm, "ci", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund")
        assert installed.status == 0, installed.errors
    return [node, str(folder / "check.js")]


@pytest.mark.parametrize("name", FACTS)
async def test_a_client_receives_the_jobs_output_byte_for_byte(
    fronts: Fronts, stub: llm_pb2_grpc.LlmServiceStub, name: str
) -> None:
    command = await command_of(name)
    ended = await run(*command, BASE_URL=fronts.one, OTHER_URL=fronts.other, MODEL=MODEL, NO_PROXY="127.0.0.1")
    assert ended.status == 0, ended.errors
    told = json.loads(ended.output.strip().splitlines()[-1])
    assert {fact: told["facts"].get(fact) for fact in FACTS[name]} == FACTS[name]
    assert told["responses"]
    responses = dict(told["responses"])
    http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(base_url=fronts.other, api_key="none", http_client=http_client) as client:
        for id_, text in told.get("broken_off", {}).items():
            responses[id_] = await resumed(client, id_, text)
        for id_ in told.get("open", ()):
            responses[id_] = await cancelled(client, id_)
    for id_, text in responses.items():
        assert PREFIX.match(id_), id_
        request = llm_pb2.GetStatusRequest(workflow_id=workflow_id_of(PREFIX.sub("resp_", id_, count=1)))
        assert text == (await stub.GetStatus(request)).result.output != "", id_
