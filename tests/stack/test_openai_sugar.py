"""What OpenAI's Python client builds upon the API: parsed answers, raw responses, its stream helper, retries."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from deploy.local.stack import Stack
from jobs.response_ids import workflow_id_of
from llm_pb import llm_pb2, llm_pb2_grpc
from tests.stack.test_openai import LONG, MODEL, PATIENCE, LostAnswers, openai_client, until_state
from tests.support.receivers import Receiver, status
from tests.support.stacks import FAST

SECRETS = json.loads(FAST["notifier"]["NOTIFIER_WEBHOOK_SECRETS"])
HELLO: Any = [{"role": "user", "content": "Hello"}]
STOPS: Any = {"extra_body": {"stop": [" with", " which"]}}
"""The answer ends by itself: the helpers take one that has reached its limit for a stream that has broken."""


class Answer(BaseModel):
    """What the model is asked for."""

    word: str


@pytest.fixture
async def client(stack: Stack) -> Any:
    async with openai_client(stack.address("http")) as client:
        yield client


async def test_the_helpers_schemas_become_those_of_jobs(client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    """No worker of the tests' stack follows a schema: the job fails, and the client reads that, too."""
    response = await client.responses.parse(model="structured", input="Say a word.", text_format=Answer)
    assert response.status == "failed"
    found = await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=workflow_id_of(response.id)))
    schema = json.loads(found.job.params.json_schema)
    assert (list(schema["properties"]), schema["additionalProperties"]) == (["word"], False)
    with pytest.raises(openai.APIStatusError) as failed:
        await client.chat.completions.parse(model="structured", messages=HELLO, response_format=Answer)
    assert failed.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.parse(model=MODEL, input="Say a word.", text_format=Answer)
    assert refused.value.param == "text.format.schema"


async def test_answers_are_parsed(client: AsyncOpenAI) -> None:
    response = await client.responses.parse(model=MODEL, input="Hi", **STOPS)
    assert response.status == "completed"
    assert response.output_text
    completion = await client.chat.completions.parse(model=MODEL, messages=HELLO, **STOPS)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content


async def test_the_helpers_of_streams_hold_the_whole_answer(client: AsyncOpenAI) -> None:
    async with client.responses.stream(model=MODEL, input="Hi", **STOPS) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == final.output_text != ""
    async with client.chat.completions.stream(model=MODEL, messages=HELLO, **STOPS) as chat:
        deltas = [event.delta async for event in chat if event.type == "content.delta"]
        whole = await chat.get_final_completion()
    assert "".join(deltas) == whole.choices[0].message.content != ""


async def test_the_helper_continues_a_response_after_an_event(client: AsyncOpenAI) -> None:
    made = await client.responses.create(model=MODEL, input="Hi", background=True, **STOPS)
    async with client.responses.stream(response_id=made.id) as stream:
        events: list[Any] = [event async for event in stream]
        whole = (await stream.get_final_response()).output_text
    numbers = [event.sequence_number for event in events]
    number = next(event.sequence_number for event in events if event.type == "response.output_text.delta")
    for after in (number, numbers[-1]):
        async with await client.responses.retrieve(made.id, stream=True, starting_after=after) as rest:
            later = [event async for event in rest]
        known = [event for event in events if event.sequence_number <= after]
        held = [event.delta for event in (*known, *later) if event.type == "response.output_text.delta"]
        assert "".join(held) == whole != ""
        assert all(event.sequence_number > after for event in later)
        # After the end there is nothing more, and the stream ends at once.
        assert bool(later) == (after != numbers[-1])
    async with client.responses.stream(response_id=made.id, starting_after=number) as stream:
        assert (await stream.get_final_response()).output_text == whole


async def test_raw_and_streaming_responses(client: AsyncOpenAI) -> None:
    raw = await client.responses.with_raw_response.create(model=MODEL, input="Hi", max_output_tokens=2)
    assert raw.headers["content-type"] == "application/json"
    parsed = raw.parse()
    assert parsed.output_text
    async with client.responses.with_streaming_response.create(model=MODEL, input="Hi", max_output_tokens=2) as whole:
        assert json.loads(await whole.read())["object"] == "response"
    async with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=HELLO, max_tokens=2, stream=True
    ) as lines:
        assert [line async for line in lines.iter_lines() if line][-1] == "data: [DONE]"


async def test_the_synchronous_client(stack: Stack) -> None:
    def create() -> str:
        with (
            openai.DefaultHttpxClient(trust_env=False) as http_client,
            OpenAI(base_url=f"http://{stack.address('http')}/v1", api_key="none", http_client=http_client) as client,
        ):
            return client.responses.create(model=MODEL, input="Hi", max_output_tokens=2).output_text

    assert await asyncio.to_thread(create)


async def test_a_timeout_of_the_client_cancels_the_job(
    client: AsyncOpenAI, stack: Stack, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    """With its retries at an end, nobody is left who could ask for the answer."""
    impatient = client.with_options(max_retries=0, timeout=3)
    with pytest.raises(openai.APITimeoutError):
        await impatient.responses.create(
            model="idle", input="Hi", user="impatient", extra_headers={"x-stainless-retry-count": openai.omit}
        )
    async with asyncio.timeout(PATIENCE):
        while not (jobs := (await stub.List(llm_pb2.ListRequest(user_id="impatient"))).jobs):
            pass
    await until_state(stub, jobs[0].status.workflow_id, lambda found: found.cancel_requested)


async def test_a_lost_answer_is_asked_for_again(stack: Stack) -> None:
    address = stack.address("http")
    async with (
        httpx.AsyncClient(transport=LostAnswers(1), trust_env=False) as lossy,
        AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", http_client=lossy, timeout=PATIENCE) as client,
    ):
        completion = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    assert completion.choices[0].message.content


async def test_the_outcome_goes_to_the_target_of_the_request(client: AsyncOpenAI, receiver: Receiver) -> None:
    """OpenAI's client verifies and parses what arrives."""
    for name in ("responses", "chat"):
        target = {"webhook": {"url": receiver.on(f"/of-{name}", status(200)), "format": "WEBHOOK_FORMAT_OPENAI"}}
        extra: Any = {"extra_body": {"durable_llm": {"notify": [target]}}}
        if name == "responses":
            made = await client.responses.create(model=MODEL, input="Hi", background=True, max_output_tokens=2, **extra)
            id_ = made.id
        else:
            chat = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, **extra)
            id_ = chat.id.replace("chatcmpl-", "resp_")
        (request,) = await receiver.received(f"/of-{name}", 1)
        event = openai.OpenAI(api_key="none", webhook_secret=SECRETS[0]).webhooks.unwrap(request.body, request.headers)
        assert (event.type, event.data.id) == ("response.incomplete", id_)  # type: ignore[union-attr]
    wrong: Any = {"durable_llm": {"notify": [{"webhook": {"url": "ftp://a"}}]}}
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(model=MODEL, input="Hi", extra_body=wrong)
    assert bad.value.param == "durable_llm.notify[0].webhook.url"


async def test_a_running_job_that_has_started_over_is_continued(
    client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    """Its events are numbered by the output that their reader holds, before the job has ended as after it."""
    made = await client.responses.create(
        model=MODEL,
        input="[[vary]] [[fault:failed@40:once]]",
        background=True,
        stream=True,
        max_output_tokens=LONG,
    )
    async with made:
        events = [event async for event in made]
    assert (events[-1].type, events[-1].code) == ("error", "output_replaced")  # type: ignore[union-attr]
    id_, numbers = events[0].response.id, [event.sequence_number for event in events]  # type: ignore[union-attr]
    assert numbers == sorted(set(numbers))
    text, last, reads = "", -1, 0
    while reads < 3:
        async with await client.responses.retrieve(
            id_, stream=True, starting_after=last if last >= 0 else openai.omit
        ) as stream:
            async for event in stream:
                if event.type == "error":
                    # On a busy machine a reader may get the first output before the gateway has seen its end.
                    assert (event.code, last < 2**36) == ("output_replaced", True), event
                    text, last, reads = "", -1, 0
                    break
                assert event.sequence_number > last
                last = event.sequence_number
                if event.type == "response.output_text.delta":
                    text, reads = text + event.delta, reads + 1
                    break
    await client.responses.cancel(id_)
    async with await client.responses.retrieve(id_, stream=True, starting_after=last) as stream:
        async for event in stream:
            assert event.sequence_number > last
            last = event.sequence_number
            if event.type == "response.output_text.delta":
                text += event.delta
    workflow_id = workflow_id_of(id_)
    assert text == (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id))).result.output
    assert last > 2**36
