"""The engine openai: the suite's own HTTP front is the provider, and a scripted one where a provider misbehaves."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from deploy.local.stack import Stack
from jobs.application_errors import to_attempt_error
from jobs.errors import EngineDead, EngineFailed, JobError, PromptTooLong, UnsupportedParams
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gpu_worker.engines.engine import CannotContinue, Engine, EngineConfig, Generation, Output, create_engine
from tests.support.jobs import new_job, run_job, until_output
from tests.support.versions import until

LENGTH = llm_pb2.FINISH_REASON_LENGTH
SECRET = "the words of the prompt"


def new_engine(address: str, **options: Any) -> Engine:
    chosen = {"base_url": f"http://{address}/v1", "context_tokens": 8192, **options}
    return create_engine("openai", EngineConfig("docstrings", 3, chosen))


@pytest.fixture
async def engine(stack: Stack) -> AsyncIterator[Engine]:
    engine = new_engine(stack.address("http"))
    await engine.start()
    yield engine
    await engine.close()


def job(prompt: str = "Say something.", **params: Any) -> llm_pb2.JobRequest:
    return llm_pb2.JobRequest(prompt=prompt, params=llm_pb2.SamplingParams(**{"max_tokens": 12, "seed": 5, **params}))


async def outputs(engine: Engine, request: llm_pb2.JobRequest) -> list[Output]:
    return [output async for output in engine.generate(Generation("attempt", request))]


def text_of(made: list[Output]) -> str:
    return "".join(output.text for output in made)


@asynccontextmanager
async def provider(answer: Any) -> AsyncIterator[str]:
    """Run a provider that answers each completion so, and yield its address."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    try:
        yield f"{host}:{port}"
    finally:
        await runner.cleanup()


def streaming(*chunks: dict[str, Any], end: str = "data: [DONE]\n\n", headers: dict[str, str] | None = None) -> Any:
    async def answer(_: web.Request) -> web.Response:
        base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
        text = "".join(f"data: {json.dumps({**base, **chunk})}\n\n" for chunk in chunks)
        return web.Response(text=text + end, content_type="text/event-stream", headers=headers)

    return answer


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


async def test_the_text_is_the_providers(engine: Engine, stack: Stack) -> None:
    made = await outputs(engine, job())
    client = openai.AsyncOpenAI(base_url=f"http://{stack.address('http')}/v1", api_key="none", max_retries=0)
    answer = await client.chat.completions.create(
        model="docstrings", messages=[{"role": "user", "content": "Say something."}], seed=5, max_tokens=12
    )
    await client.close()
    assert text_of(made) == answer.choices[0].message.content
    assert made[0] == Output("", (), 0)
    assert sum(len(output.token_ids) for output in made) == 12
    assert (made[-1].finish_reason, made[-1].prompt_tokens) == (LENGTH, answer.usage and answer.usage.prompt_tokens)
    assert [output.finish_reason for output in made[:-1]] == [None] * (len(made) - 1)


async def test_log_probabilities_come_with_each_token(engine: Engine) -> None:
    made = await outputs(engine, job(logprobs=2))
    assert all(len(output.logprobs) == len(output.token_ids) for output in made)
    places = [place for output in made for place in output.logprobs]
    assert len(places) == 12
    assert all(len(place.top) == 2 for place in places)
    assert [place.offset for place in places] == sorted(place.offset for place in places)


async def test_what_only_vllm_knows_is_refused_or_sent(engine: Engine, stack: Stack) -> None:
    for params in ({"top_k": 4}, {"min_tokens": 3}, {"regex": "a"}, {"choice": llm_pb2.Choice(options=["a"])}):
        with pytest.raises(UnsupportedParams, match=rf"params\.{next(iter(params))}: the provider does not support it"):
            await outputs(engine, job(**params))
    knows = create_engine(
        "openai",
        EngineConfig(
            "structured",
            3,
            {"base_url": f"http://{stack.address('http')}/v1", "context_tokens": 8192, "dialect": "vllm"},
        ),
    )
    # The gateway of the tests knows the model, whose worker is that of another one.
    with pytest.raises(JobError):
        await outputs(knows, job(choice=llm_pb2.Choice(options=["a"])))
    await knows.close()


async def test_a_generation_that_is_given_up_is_cancelled_at_the_provider(stack: Stack, stub: LlmServiceStub) -> None:
    engine = new_engine(stack.address("http"), extra_body={"user": "given-up"})
    async with aclosing(engine.generate(Generation("attempt", job(max_tokens=8000)))) as stream:
        async for output in stream:
            if output.text:
                assert engine.load().running == 1
                break
    assert engine.load().running == 0

    async def cancelled() -> bool:
        listed = await stub.List(llm_pb2.ListRequest(user_id="given-up"))
        return [summary.status.state for summary in listed.jobs] == [llm_pb2.JOB_STATE_CANCELLED]

    await until(cancelled)
    await engine.close()


async def test_closing_ends_what_runs(stack: Stack) -> None:
    engine = new_engine(stack.address("http"))
    started = asyncio.Event()

    async def endless() -> None:
        async for output in engine.generate(Generation("attempt", job(max_tokens=8000))):
            if output.text:
                started.set()

    running = asyncio.create_task(endless())
    await started.wait()
    await engine.close()
    with pytest.raises(EngineDead):
        await running
    with pytest.raises(EngineDead):
        await outputs(engine, job())


async def test_an_output_is_never_continued(engine: Engine) -> None:
    with pytest.raises(CannotContinue):
        await anext(engine.generate(Generation("attempt", job(), (0, 0), "So far")))


@pytest.mark.parametrize(
    ("status", "headers", "body", "error", "retry_after"),
    [
        (429, {"Retry-After": "7"}, {}, EngineFailed, timedelta(seconds=7)),
        (503, {"Retry-After": "1e12"}, {}, EngineFailed, timedelta(hours=1)),
        (500, {"Retry-After": "soon"}, {}, EngineFailed, None),
        (401, {}, {}, EngineFailed, None),
        (400, {}, {"code": "context_length_exceeded"}, PromptTooLong, None),
        (422, {}, {"param": "temperature"}, UnsupportedParams, None),
    ],
)
async def test_what_a_provider_refuses(
    status: int, headers: dict[str, str], body: dict[str, str], error: type[JobError], retry_after: timedelta | None
) -> None:
    async def answer(_: web.Request) -> web.Response:
        content = {"error": {"message": SECRET, "type": "t", "param": None, "code": None, **body}}
        return web.json_response(content, status=status, headers=headers)

    async with provider(answer) as address:
        engine = new_engine(address)
        with pytest.raises(error) as refused:
            await outputs(engine, job(SECRET))
        await engine.close()
    assert SECRET not in str(refused.value)
    assert refused.value.retry_after == retry_after
    assert to_attempt_error(refused.value).next_retry_delay == retry_after


@pytest.mark.parametrize(
    "answer",
    [
        streaming(piece("So")),
        streaming(piece("So"), end=""),
        streaming(piece("So"), end='data: {"error": {"message": "the words"}}\n\n'),
        streaming(piece("So"), end="data: {nonsense\n\n"),
        streaming(end=""),
    ],
    ids=["no reason", "cut", "error", "nonsense", "nothing"],
)
async def test_a_stream_that_breaks_fails_the_attempt(answer: Any) -> None:
    async with provider(answer) as address:
        engine = new_engine(address)
        with pytest.raises(EngineFailed):
            await outputs(engine, job())
        await engine.close()


async def test_a_provider_that_is_away_fails_the_attempt() -> None:
    async with provider(streaming()) as address:
        pass
    engine = new_engine(address)
    await engine.start()
    with pytest.raises(EngineFailed, match="cannot be reached"):
        await outputs(engine, job())
    await engine.close()


@pytest.mark.parametrize("headers", [None, {"x-litellm-response-cost": "0.0000125"}])
async def test_the_provider_tells_costs_and_cached_tokens(headers: dict[str, str] | None) -> None:
    usage: dict[str, Any] = {"prompt_tokens": 90, "completion_tokens": 5, "total_tokens": 95}
    usage["prompt_tokens_details"] = {"cached_tokens": 64}
    if headers is None:
        usage["cost"] = 0.0000125
    surrogate = piece("a\ud83d")
    async with provider(streaming(surrogate, piece("b", "stop"), {"usage": usage}, headers=headers)) as address:
        engine = new_engine(address)
        made = await outputs(engine, job())
        await engine.close()
    assert text_of(made) == "a?b"
    assert made[-1].finish_reason == llm_pb2.FINISH_REASON_STOP
    assert (made[-1].prompt_tokens, made[-1].cached_prompt_tokens, made[-1].cost_micros) == (90, 64, 13)
    assert sum(len(output.token_ids) for output in made) == 5


async def test_the_key_is_read_for_each_request(tmp_path: Path) -> None:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        response: web.Response = await streaming(piece("a", "stop"))(request)
        return response

    key = tmp_path / "key"
    async with provider(answer) as address:
        engine = new_engine(address, api_key_file=str(key))
        for text in ("first\n", "second"):
            key.write_text(text)
            await outputs(engine, job())
        key.unlink()
        with pytest.raises(EngineFailed, match="the key of the provider cannot be read"):
            await outputs(engine, job())
        await engine.close()
    assert seen == ["Bearer first", "Bearer second"]


async def test_a_worker_waits_for_its_provider_and_starts_over_after_its_death(
    stack: Stack, stub: LlmServiceStub
) -> None:
    """The model `idle` of this stack is one that the front serves, behind a provider that first asks to wait."""
    asked: list[float] = []
    prompt = f"Say {uuid.uuid4().hex}."

    async def answer(request: web.Request) -> web.Response:
        # Jobs of other tests may wait for a worker of the model, too.
        if prompt in await request.text():
            asked.append(time.monotonic())
            if len(asked) == 1:
                return web.json_response({}, status=429, headers={"Retry-After": "2"})
        raise web.HTTPTemporaryRedirect(f"http://{stack.address('http')}/v1/chat/completions")

    async with provider(answer) as address:
        options = {"base_url": f"http://{address}/v1", "context_tokens": 8192}
        settings = {
            "GPU_WORKER_ENGINE": "openai",
            "GPU_WORKER_MODEL": "idle",
            "GPU_WORKER_MODEL_PATH": "docstrings",
            "GPU_WORKER_TASK_QUEUE": "llm-gpu-activities.idle",
            "GPU_WORKER_ENGINE_OPTIONS": json.dumps(options),
        }
        worker = stack.add("gpu-worker", settings)
        await worker.start()
        await worker.wait_ready()
        try:
            request = new_job(prompt, model="idle", params={"max_tokens": 300, "seed": 5})
            whole = await run_job(stub, request)
            assert whole.states[-1] == "SUCCEEDED"
            metadata = whole.final.result.metadata
            assert (metadata.engine, metadata.output_tokens, metadata.gpu.name) == ("openai", 300, address)
            assert metadata.prompt_tokens > 0
            assert metadata.attempts == 2
            again = new_job(prompt, model="idle", params={"max_tokens": 300, "seed": 5})
            id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=again))).workflow_id
            await until_output(stub, id_)
            await worker.kill()
            await worker.start()
            last = [message async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_))][-1]
            assert last.status.state == llm_pb2.JOB_STATE_SUCCEEDED
            assert last.result.output == whole.final.result.output
            assert last.result.metadata.wasted_tokens > 0
        finally:
            await worker.terminate()
    assert asked[1] - asked[0] >= 2, "the second attempt came before the provider wanted it"
