"""OpenAI's unmodified client against the HTTP front, in front of the real stack."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from deploy.local.stack import Stack
from jobs.response_ids import response_id, workflow_id_of
from llm_pb import common_pb2, llm_pb2, llm_pb2_grpc

PATIENCE: Final = 120
MODEL: Final = "docstrings"
LONG: Final = 4000
"""Output tokens of a job that runs on while a test looks at it: 20 s."""


@asynccontextmanager
async def openai_client(address: str, api_key: str = "none", **options: Any) -> AsyncIterator[AsyncOpenAI]:
    http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(
        base_url=f"http://{address}/v1", api_key=api_key, http_client=http_client, timeout=PATIENCE, **options
    ) as client:
        yield client


@pytest.fixture(scope="module")
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(stack.address("http")) as client:
        yield client


@pytest.fixture(scope="module")
async def other(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    """A client of another front process."""
    front = stack.add("http")
    await front.start()
    await front.wait_ready()
    async with openai_client(stack.address(front.name)) as client:
        yield client
    await front.terminate()


async def status_of(stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str) -> llm_pb2.GetStatusResponse:
    return await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id))


async def until_state(
    stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str, wanted: Callable[[llm_pb2.JobStatus], bool]
) -> llm_pb2.JobStatus:
    """Watch a job until its status is as wanted."""
    async with asyncio.timeout(PATIENCE):
        call = stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=workflow_id))
        async for message in call:
            if message.HasField("status") and wanted(message.status):
                call.cancel()
                return message.status
    raise AssertionError("the job has ended otherwise")


def cancelled(status: llm_pb2.JobStatus) -> bool:
    return status.state == llm_pb2.JOB_STATE_CANCELLED


async def test_a_response_is_the_output_of_a_job(client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    response = await client.responses.create(
        model=MODEL,
        instructions="Be brief.",
        input="Tell me a story.",
        max_output_tokens=30,
        temperature=0.5,
        user="alice",
        metadata={"team": "x"},
    )
    outcome = await status_of(stub, workflow_id_of(response.id))
    assert response.output_text == outcome.result.output != ""
    # The simulated model goes on to its limit.
    assert (response.status, response.incomplete_details and response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        outcome.result.metadata.prompt_tokens,
        outcome.result.metadata.output_tokens,
    )
    assert (response.instructions, response.temperature, response.metadata) == ("Be brief.", 0.5, {"team": "x"})
    assert (response.user, response.background, response.model) == ("alice", False, MODEL)
    assert await client.responses.retrieve(response.id) == response
    items = await client.responses.input_items.list(response.id)
    assert [(item.role, item.content[0].text) for item in items.data] == [("user", "Tell me a story.")]  # type: ignore[union-attr]


async def test_a_stream_broken_off_anywhere_continues_at_another_front(
    client: AsyncOpenAI, other: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    chance = random.Random(5)
    stream = await client.responses.create(
        model=MODEL, input="Go on.", background=True, stream=True, max_output_tokens=600
    )
    text, last, id_, number = "", -1, "", 0
    async with stream:
        async for event in stream:
            last = event.sequence_number
            if event.type == "response.created":
                id_ = event.response.id
            if event.type == "response.output_text.delta":
                text += event.delta
                break
    clients = [other, client]
    ended: Response | None = None
    while ended is None:
        number += 1
        assert number < 400
        left = chance.randint(1, 40)
        resumed = await clients[number % 2].responses.retrieve(id_, stream=True, starting_after=last)
        async with resumed:
            async for event in resumed:
                assert event.sequence_number > last
                last = event.sequence_number
                if event.type == "response.output_text.delta":
                    text += event.delta
                if event.type == "response.incomplete":
                    ended = event.response
                left -= 1
                if not left:
                    break
    result = (await status_of(stub, workflow_id_of(id_))).result
    assert text == ended.output_text == result.output
    assert number > 1


async def test_a_background_response_goes_on_until_it_is_cancelled(
    client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    response = await client.responses.create(model=MODEL, input="Go on.", background=True, max_output_tokens=LONG)
    assert response.status == "queued"
    workflow_id = workflow_id_of(response.id)
    async with await client.responses.retrieve(response.id, stream=True) as stream:
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
    # Its reader has gone.
    assert (await client.responses.retrieve(response.id)).status == "in_progress"
    ended = await client.responses.cancel(response.id)
    assert (ended.status, ended.error) == ("cancelled", None)
    result = (await status_of(stub, workflow_id)).result
    assert ended.output_text == result.output != ""
    async with await client.responses.retrieve(response.id, stream=True) as stream:
        events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.status == "cancelled"
    assert await client.responses.cancel(response.id) == ended


async def test_only_what_runs_in_the_background_can_be_cancelled(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model=MODEL, input="Go on.", max_output_tokens=3)
    with pytest.raises(openai.BadRequestError, match="background"):
        await client.responses.cancel(response.id)


async def test_a_deleted_response_is_gone(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model=MODEL, input="Go on.", max_output_tokens=3)
    await client.responses.delete(response.id)
    async with asyncio.timeout(PATIENCE):
        while await exists(client, response.id):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def exists(client: AsyncOpenAI, id_: str) -> bool:
    try:
        await client.responses.retrieve(id_)
    except openai.NotFoundError:
        return False
    return True


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_not_stored_is_deleted_once_it_was_read(client: AsyncOpenAI, *, stream: bool) -> None:
    answer = await client.responses.create(
        model=MODEL, input="Go on.", max_output_tokens=3, store=False, stream=stream, metadata={"stream": str(stream)}
    )
    if isinstance(answer, Response):
        id_ = answer.id
    else:
        async with answer:
            events = [event async for event in answer]
        assert events[-1].type == "response.incomplete"
        id_ = events[-1].response.id
    async with asyncio.timeout(PATIENCE):
        while await exists(client, id_):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", ["responses", "chat", "waiting"])
async def test_a_foreground_job_is_cancelled_with_its_client(
    client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub, kind: str
) -> None:
    user, more = f"leaver-{kind}", {"model": MODEL, "user": f"leaver-{kind}"}
    if kind == "responses":
        async with await client.responses.create(input="Go on.", stream=True, max_output_tokens=LONG, **more) as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    break
    else:
        messages: Any = [{"role": "user", "content": "Go on."}]
        asking = client.chat.completions.create(
            messages=messages,
            stream=kind == "chat",
            max_tokens=LONG,
            # A client that counts its tries may come back for an answer that it waits for.
            extra_headers={"X-Stainless-Retry-Count": openai.Omit()} if kind == "waiting" else None,
            **more,  # type: ignore[arg-type]
        )
        if kind == "chat":
            async with await asking as chunks:
                async for chunk in chunks:
                    if chunk.choices[0].delta.content:
                        break
        else:
            task = asyncio.create_task(asking)  # type: ignore[arg-type]
            await listed(stub, user)
            task.cancel()
    workflow_id = await listed(stub, user)
    await until_state(stub, workflow_id, cancelled)


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "impatient"}, {}], ids=["key", "count"])
async def test_an_impatient_clients_tries_get_the_whole_answer(client: AsyncOpenAI, headers: dict[str, str]) -> None:
    """Each try is given up before the answer is there, and the next one goes on waiting for the same job."""
    impatient = client.with_options(timeout=1, max_retries=60)
    response = await impatient.responses.create(
        model=MODEL, input=f"Go on {headers}.", max_output_tokens=600, extra_headers=headers
    )
    assert response.status == "incomplete"
    assert response.usage is not None
    assert response.usage.output_tokens == 600


async def test_a_repeat_that_must_not_be_stored_deletes_no_stored_job(client: AsyncOpenAI) -> None:
    headers = {"Idempotency-Key": "stored"}
    stored = await client.responses.create(model=MODEL, input="Go on.", max_output_tokens=5, extra_headers=headers)
    with pytest.raises(openai.ConflictError):
        await client.responses.create(
            model=MODEL, input="Go on.", max_output_tokens=5, store=False, extra_headers=headers
        )
    assert await exists(client, stored.id)


async def listed(stub: llm_pb2_grpc.LlmServiceStub, user: str) -> str:
    """Return the id of the user's one job, once it is listed."""
    async with asyncio.timeout(PATIENCE):
        while not (jobs := (await stub.List(llm_pb2.ListRequest(user_id=user))).jobs):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    (job,) = jobs
    return str(job.status.workflow_id)


async def test_a_chat_completion_streams_the_output_with_usage(
    client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go on."}],
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
        seed=7,
    )
    async with stream:
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    id_ = chunks[0].id.replace("chatcmpl-", "resp_")
    result = (await status_of(stub, workflow_id_of(id_))).result
    assert text == result.output != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        result.metadata.prompt_tokens,
        result.metadata.output_tokens,
    )
    tokens = [
        token.token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs and choice.logprobs.content
        for token in choice.logprobs.content
    ]
    assert tokens == [token.chosen.token for token in result.logprobs]
    assert len(tokens) == 40


async def test_a_chat_completion_and_a_completion_answer_at_once(
    client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    chat = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Go on."}], max_tokens=5, logprobs=True, stop=["zzz"]
    )
    result = (await status_of(stub, workflow_id_of(chat.id.replace("chatcmpl-", "resp_")))).result
    assert chat.choices[0].message.content == result.output
    assert (chat.choices[0].finish_reason, chat.usage and chat.usage.completion_tokens) == ("length", 5)
    assert chat.choices[0].logprobs is not None
    assert len(chat.choices[0].logprobs.content or ()) == 5
    completion = await client.completions.create(model=MODEL, prompt="Go on.", max_tokens=5, logprobs=1)
    result = (await status_of(stub, workflow_id_of(completion.id.replace("cmpl-", "resp_")))).result
    assert completion.choices[0].text == result.output
    async with await client.completions.create(model=MODEL, prompt="Go on.", max_tokens=5, stream=True) as stream:
        pieces = [piece.choices[0].text async for piece in stream]
    assert len("".join(pieces)) > 0


async def test_a_service_tier_is_the_class_of_the_job(client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    """The answer says which one the job got."""
    chat = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Go on."}], max_tokens=2, service_tier="priority"
    )
    status = (await status_of(stub, workflow_id_of(chat.id.replace("chatcmpl-", "resp_")))).status
    assert (chat.service_tier, status.job_class) == ("priority", common_pb2.JOB_CLASS_HIGH)
    response = await client.responses.create(model=MODEL, input="Go on.", background=True, service_tier="flex")
    status = (await status_of(stub, workflow_id_of(response.id))).status
    assert (response.service_tier, status.job_class) == ("flex", common_pb2.JOB_CLASS_BACKGROUND)
    assert (await client.responses.cancel(response.id)).service_tier == "flex"


async def test_models_are_listed(client: AsyncOpenAI) -> None:
    names = [model.id async for model in client.models.list()]
    assert MODEL in names
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nothing")


async def test_errors_have_the_clients_form(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(model="nothing", input="Hi")
    assert bad.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(model=MODEL, input="Hi", max_output_tokens=0)
    assert (bad.value.param, bad.value.type) == ("max_output_tokens", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(model=MODEL, input="Hi", tools=[{"type": "web_search"}])
    assert (bad.value.param, bad.value.code) == ("tools", "unsupported_parameter")
    for id_ in ("resp_nothing", "resp_" + "bGxtam9iLW5vLWJvZHk"):
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(id_)
    failed = await client.responses.create(model=MODEL, input="[[fault:failed@3]]", max_output_tokens=9)
    assert failed.error is not None
    assert (failed.status, failed.error.code) == ("failed", "server_error")
    with pytest.raises(openai.InternalServerError) as broken:
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "[[fault:failed@3]]"}], max_tokens=9
        )
    assert broken.value.response.headers["x-should-retry"] == "false"
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "[[fault:failed@3]]"}], max_tokens=9, stream=True
    )
    async with stream:
        with pytest.raises(openai.APIError, match="scripted"):
            await drain(stream)


async def drain(stream: openai.AsyncStream[Any]) -> None:
    async for _ in stream:
        pass


async def test_an_idempotency_key_finds_the_first_job(client: AsyncOpenAI) -> None:
    async def create(text: str) -> Response:
        return await client.responses.create(
            model=MODEL, input=text, background=True, extra_headers={"Idempotency-Key": "any text: of 1 request"}
        )

    first = await create("Go on.")
    assert (await create("Go on.")).id == first.id
    with pytest.raises(openai.ConflictError) as conflict:
        await create("Something else.")
    assert conflict.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "keys", [[""], ["a", "b"], ["a", "a"], ["a\x01b"], ["a\tb"], ["x" * 2000]], ids=lambda keys: repr(keys)[:20]
)
async def test_an_idempotency_key_that_is_none_is_refused(stack: Stack, keys: list[str]) -> None:
    """Taken for one, it would find a job of another request, or none."""
    headers = [("Idempotency-Key", key) for key in keys]
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as plain:
        for path, body in (("responses", {"input": "x"}), ("completions", {"prompt": "x"})):
            url = f"http://{stack.address('http')}/v1/{path}"
            answer = await plain.post(
                url,
                json={"model": MODEL, "max_tokens": 1, **body} if "prompt" in body else {"model": MODEL, **body},
                headers=headers,
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key"), answer.text


class LostAnswers(httpx.AsyncBaseTransport):
    """Loses the first answers to requests, as a connection that breaks does."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self.inner.handle_async_request(request)
        if self.number:
            self.number -= 1
            await response.aread()
            await response.aclose()
            raise httpx.ReadError("lost", request=request)
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_the_clients_own_retry_finds_the_first_job(stack: Stack, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    user = "retrier"
    async with openai_client(stack.address("http")) as plain:
        async with httpx.AsyncClient(transport=LostAnswers(1)) as http_client:
            losing = AsyncOpenAI(base_url=plain.base_url, api_key="none", http_client=http_client, max_retries=2)
            found = await losing.responses.create(model=MODEL, input="Go on.", background=True, user=user)
        # Equal requests that are no retries are jobs of their own.
        again = await plain.responses.create(model=MODEL, input="Go on.", background=True, user=user)
    assert again.id != found.id
    jobs: Any = ()
    async with asyncio.timeout(PATIENCE):
        while len(jobs) < 2:
            jobs = (await stub.List(llm_pb2.ListRequest(user_id=user))).jobs
    assert {job.status.workflow_id for job in jobs} == {workflow_id_of(found.id), workflow_id_of(again.id)}


async def test_a_job_that_came_another_way_is_a_response_too(
    client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    job = llm_pb2.JobRequest(user_id="grpc", request_id="1", model=MODEL, prompt="Go on.", labels={"a": "b"})
    job.params.max_tokens = 3
    workflow_id = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    async with await client.responses.retrieve(response_id(workflow_id), stream=True) as stream:
        events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.metadata == {"a": "b"}


async def test_a_rewind_ends_the_stream_and_the_retrieved_text_is_right(
    client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    """The first attempt fails after 40 tokens, and the second one generates another text."""
    stream = await client.responses.create(
        model=MODEL,
        input="[[vary]] [[fault:failed@40:once]]",
        background=True,
        stream=True,
        max_output_tokens=80,
    )
    async with stream:
        events = [event async for event in stream]
    assert (events[-1].type, events[-1].code) == ("error", "output_replaced")  # type: ignore[union-attr]
    assert events[0].type == "response.created"
    assert events[-1].sequence_number > events[-2].sequence_number
    id_ = events[0].response.id
    held = events[-2].sequence_number
    workflow_id = workflow_id_of(id_)
    await until_state(stub, workflow_id, lambda status: status.state == llm_pb2.JOB_STATE_SUCCEEDED)
    result = (await status_of(stub, workflow_id)).result
    assert result.metadata.rewinds == 1
    assert (await client.responses.retrieve(id_)).output_text == result.output
    async with await client.responses.retrieve(id_, stream=True) as whole:
        fresh = [event async for event in whole]
    assert "".join(event.delta for event in fresh if event.type == "response.output_text.delta") == result.output
    assert fresh[0].sequence_number == 2**36
    async with await client.responses.retrieve(id_, stream=True, starting_after=held) as stale:
        (error,) = [event async for event in stale]
    assert error.type == "error"


async def test_a_killed_fronts_readers_go_on_at_another(
    stack: Stack, client: AsyncOpenAI, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    front = stack.add("http")
    await front.start()
    await front.wait_ready()
    text, id_, last = "", "", -1
    async with openai_client(stack.address(front.name)) as doomed:
        stream = await doomed.responses.create(
            model=MODEL, input="Go on.", background=True, stream=True, max_output_tokens=400
        )
        async with stream:
            with contextlib.suppress(httpx.HTTPError, openai.APIError):
                async for event in stream:
                    last = event.sequence_number
                    if event.type == "response.created":
                        id_ = event.response.id
                    if event.type == "response.output_text.delta":
                        text += event.delta
                        if len(text) > 100:
                            await front.kill()
    async with await client.responses.retrieve(id_, stream=True, starting_after=last) as rest:
        async for event in rest:
            if event.type == "response.output_text.delta":
                text += event.delta
    assert event.type == "response.incomplete"
    assert text == (await status_of(stub, workflow_id_of(id_))).result.output


async def test_the_job_of_a_killed_front_that_nobody_comes_back_for_is_cancelled(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    """Nobody can come back for a completion. Its front cannot cancel it any more."""
    front = stack.add("http", {"HTTP_UNWATCHED_TIMEOUT": "PT10S"})
    await front.start()
    await front.wait_ready()
    async with openai_client(stack.address(front.name)) as doomed:
        # Nobody serves the model, so the job would wait for minutes.
        waiting = asyncio.create_task(doomed.completions.create(model="idle", prompt="Go on.", user="left-alone"))
        async with asyncio.timeout(60):
            while not (jobs := (await stub.List(llm_pb2.ListRequest(user_id="left-alone"))).jobs):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await front.kill()
        with pytest.raises(openai.APIConnectionError):
            await waiting
    ended = (await status_of(stub, jobs[0].status.workflow_id)).status
    while ended.state < llm_pb2.JOB_STATE_SUCCEEDED:
        await asyncio.sleep(0.2)
        ended = (await status_of(stub, jobs[0].status.workflow_id)).status
    assert ended.state == llm_pb2.JOB_STATE_CANCELLED
    assert "nobody has watched" in ended.error.message
