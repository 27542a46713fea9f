"""Large outputs as every front gives them: the Python client, the command, REST, OpenAI's shapes, console, webhooks."""

import hashlib
import json
import sys
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from deploy.local.stack import Stack
from durable_llm import AsyncClient
from jobs.response_ids import response_id
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.stack.test_openai import openai_client
from tests.support.commands import run
from tests.support.jobs import Seen, new_job, run_job, webhook
from tests.support.receivers import Receiver, status

PATIENCE = 120
TOKENS = 400
"""More than 1.6 MB of text."""
PROMPT = "[[wide]] Write a book."


@pytest.fixture(scope="module")
async def seen(stub: LlmServiceStub, receiver: Receiver) -> Seen:
    """What a watcher of a large job saw, whose target asks for the output."""
    job = new_job(PROMPT, params=llm_pb2.SamplingParams(max_tokens=TOKENS, seed=7))
    job.notify.extend(webhook(receiver.on("/large", status(200))))
    job.notify_options.include_output = True
    seen = await run_job(stub, job)
    assert seen.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert seen.final.result.output_file.size_bytes == len(seen.output) > 1_600_000
    return seen


@pytest.fixture(scope="module")
async def narrow(stack: Stack) -> AsyncIterator[str]:
    """The address of a front that puts at most a MiB into an answer."""
    front = stack.add("http", {"HTTP_MAX_OUTPUT_BYTES": "1048576"})
    await front.start()
    await front.wait_ready()
    yield stack.address(front.name)
    await front.terminate()


def id_of(seen: Seen) -> str:
    return seen.final.status.workflow_id


async def test_the_python_client_returns_the_whole_output(stack: Stack, seen: Seen) -> None:
    async with AsyncClient(stack.address("gateway")) as client:
        job = client.job(id_of(seen))
        result = await job.result()
        assert result.output.encode() == seen.output
        assert result.output_file == seen.final.result.output_file
        resumed = client.job(id_of(seen))
        offset = len(seen.output[:1_000_000].decode(errors="ignore").encode())
        async for _ in resumed.watch(output_offset=offset):
            pass
        assert (await resumed.result()).output == result.output


async def test_the_command_prints_it(stack: Stack, seen: Seen) -> None:
    for name in ("output", "watch"):
        command = (sys.executable, "-m", "durable_llm", name, "--quiet", id_of(seen))
        ended = await run(*command, DURABLE_LLM_ADDRESS=stack.address("gateway"))
        assert ended.output.strip() == seen.output.decode().strip(), ended.errors


async def test_rest_names_the_file_and_gives_the_text(http: httpx.AsyncClient, seen: Seen) -> None:
    answer = (await http.get(f"/jobs/{id_of(seen)}/status")).json()
    assert not answer["result"]["output"]
    assert answer["result"]["output_file"]["file_id"] == seen.final.result.output_file.file_id
    answer = await http.get(f"/jobs/{id_of(seen)}/output")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.content == seen.output
    assert (await http.head(f"/jobs/{id_of(seen)}/output")).headers["content-length"] == str(len(seen.output))


async def test_rest_gives_the_text_of_a_small_output_but_not_before_the_end(
    http: httpx.AsyncClient, stub: LlmServiceStub
) -> None:
    small = await run_job(stub, new_job(params={"max_tokens": 20}))
    assert (await http.get(f"/jobs/{id_of(small)}/output")).content == small.output
    waiting = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")), timeout=PATIENCE)
    refused = await http.get(f"/jobs/{waiting.workflow_id}/output")
    assert (refused.status_code, refused.json()["reason"]) == (409, "JOB_NOT_ENDED")


async def test_a_response_has_the_text_at_once_and_as_events_from_any_place(stack: Stack, seen: Seen) -> None:
    text = seen.output.decode()
    async with openai_client(stack.address("http")) as client:
        id_ = response_id(id_of(seen))
        assert (await client.responses.retrieve(id_)).output_text == text
        events = [event async for event in await client.responses.retrieve(id_, stream=True)]
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
        assert events[-1].response.output_text == text
        numbers = [event.sequence_number for event in events]
        assert numbers == sorted(set(numbers))
        for index in (4, len(events) // 2, len(events) - 3, len(events) - 1):
            following = await client.responses.retrieve(id_, stream=True, starting_after=numbers[index])
            assert [event.to_json() async for event in following] == [event.to_json() for event in events[index + 1 :]]


async def test_a_large_answer_is_whole_as_it_is_generated(stack: Stack, seen: Seen) -> None:
    asked = {"model": "docstrings", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS}
    async with openai_client(stack.address("http")) as client:
        answer = await client.chat.completions.create(**asked)
        assert len(answer.choices[0].message.content.encode()) > 1_600_000
        stream = await client.responses.create(
            model="docstrings", input=PROMPT, max_output_tokens=TOKENS, background=True, stream=True
        )
        deltas, last = "", None
        async for event in stream:
            deltas += event.delta if event.type == "response.output_text.delta" else ""
            last = event
        assert last.response.output_text == deltas
        assert len(deltas.encode()) > 1_600_000


async def test_an_answer_that_gets_too_large_names_the_file(narrow: str, seen: Seen) -> None:
    file_id = seen.final.result.output_file.file_id
    async with openai_client(narrow) as client:
        id_ = response_id(id_of(seen))
        with pytest.raises(openai.UnprocessableEntityError) as error:
            await client.responses.retrieve(id_)
        assert (error.value.code, file_id in error.value.message) == ("output_too_large", True)
        events = [event async for event in await client.responses.retrieve(id_, stream=True)]
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == (
            seen.output.decode()
        )
        assert (events[-1].type, events[-1].code, file_id in events[-1].message) == ("error", "output_too_large", True)


async def test_the_console_shows_the_beginning_and_a_link(http: httpx.AsyncClient, seen: Seen) -> None:
    page = (await http.get(f"/console/jobs/{id_of(seen)}")).text
    assert f"Download all {len(seen.output)} bytes" in page
    assert seen.output.decode()[:20].strip() in page
    assert len(page) < 400_000
    assert (await http.get(f"/console/jobs/{id_of(seen)}/output")).content == seen.output


async def test_a_webhook_says_that_the_output_is_a_file(receiver: Receiver, seen: Seen) -> None:
    (request,) = await receiver.received("/large")
    data = json.loads(request.body)["data"]
    assert data["outputOmitted"]
    assert "output" not in data["result"]
    assert data["result"]["outputFile"]["fileId"] == seen.final.result.output_file.file_id
    assert hashlib.sha256(seen.output).digest() == seen.final.result.output_file.sha256
