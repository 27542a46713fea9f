"""The engine openai with responses in the background: a lost worker's job goes on, and nothing is paid twice."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from aiohttp import web
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs.errors import EngineFailed, InvalidJob, UnsupportedParams
from jobs.response_ids import workflow_id_of
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gpu_worker.engines.engine import Abandons, CannotContinue, Engine, Generation
from tests.stack.test_openai_engine import LENGTH, job, new_engine, outputs, provider, text_of
from tests.support.jobs import new_job, run_job, watch
from tests.support.stacks import FAST, SOON_LOST, stack_settings
from tests.support.versions import until
from tests.support.watchers import watch_in_pieces, when_output_reaches

TOKENS = 900
"""A job has them for seconds, so that it has not ended when its worker is killed."""


def background(address: str, **options: Any) -> Engine:
    return new_engine(address, background=True, dialect="vllm", **options)


@pytest.fixture
async def engine(stack: Stack) -> AsyncIterator[Engine]:
    engine = background(stack.address("http"))
    await engine.start()
    yield engine
    await engine.close()


async def jobs_of(stub: LlmServiceStub, user: str) -> set[str]:
    """Return the ids of the user's jobs, as far as they are listed."""
    return {job.status.workflow_id for job in (await stub.List(llm_pb2.ListRequest(user_id=user), timeout=60)).jobs}


async def test_the_text_is_the_providers(engine: Engine, stub: LlmServiceStub) -> None:
    made = await outputs(engine, job())
    alike = new_job(
        messages=[{"role": llm_pb2.ROLE_USER, "content": "Say something."}], params={"seed": 5, "max_tokens": 12}
    )
    whole = await run_job(stub, alike)
    assert text_of(made) == whole.final.result.output
    assert (made[-1].finish_reason, sum(len(output.token_ids) for output in made)) == (LENGTH, 12)
    assert made[-1].prompt_tokens == whole.final.result.metadata.prompt_tokens


async def test_it_goes_on_after_what_was_published(engine: Engine, stub: LlmServiceStub) -> None:
    """Whatever the heartbeat knows of it, and although the feed may hold more or less."""
    asked = job(max_tokens=60)
    first = Generation("1", asked)
    places: list[tuple[internal_pb2.ProviderResponse, str, int]] = []
    text, tokens = "", 0
    async with aclosing(engine.generate(first)) as stream:
        async for output in stream:
            text, tokens = text + output.text, tokens + len(output.token_ids)
            state = internal_pb2.ProviderResponse()
            state.CopyFrom(first.provider_response)
            places.append((state, text, tokens))
    assert first.provider_response.response_id
    assert first.provider_response.output_bytes == len(text.encode())
    middle = len(places) // 2
    for (state, _, _), (_, held, count) in (
        (places[middle], places[middle]),
        (places[5], places[middle]),
        (places[-1], places[middle]),
        (places[3], places[-2]),
        (places[1], ("", "", 0)),
    ):
        again = Generation("2", asked, (0,) * count, held)
        again.provider_response.CopyFrom(state)
        made = [output async for output in engine.generate(again)]
        assert held + text_of(made) == text
        assert count + sum(len(output.token_ids) for output in made) == 60
    unknown = Generation("3", asked, (0,), "another text")
    unknown.provider_response.CopyFrom(places[middle][0])
    with pytest.raises(CannotContinue):
        await anext(aiter([output async for output in engine.generate(unknown)]))  # type: ignore[arg-type]
    assert unknown.provider_response.response_id, "it can be read from its beginning"
    (id_,) = {state.response_id for state, _, _ in places if state.response_id}
    status = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id_of(id_)))
    assert status.status.state == llm_pb2.JOB_STATE_SUCCEEDED


async def test_a_response_that_is_gone_is_generated_again(engine: Engine) -> None:
    never = Generation("1", job())
    never.provider_response.response_id = "resp_bGxtam9iLWEtMQ"
    assert text_of([output async for output in engine.generate(never)]) == text_of(await outputs(engine, job()))
    lost = Generation("2", job(), (0,), "some")
    lost.provider_response.response_id = "resp_bGxtam9iLWEtMQ"
    with pytest.raises(CannotContinue):
        _ = [output async for output in engine.generate(lost)]
    with pytest.raises(CannotContinue):
        _ = [output async for output in engine.generate(Generation("3", job(), (0,), "some"))]


async def test_an_abandoned_response_is_cancelled(engine: Engine, stub: LlmServiceStub) -> None:
    generation = Generation("1", job(max_tokens=8000))
    async with aclosing(engine.generate(generation)) as stream:
        async for output in stream:
            if output.text:
                break
    id_ = workflow_id_of(generation.provider_response.response_id)
    before = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    assert before.status.state == llm_pb2.JOB_STATE_RUNNING
    assert isinstance(engine, Abandons)
    await engine.abandon(generation.provider_response)
    assert (await watch(stub, id_)).states[-1] == "CANCELLED"
    await engine.abandon(internal_pb2.ProviderResponse(response_id="resp_none"))


async def test_what_responses_do_not_have_is_refused(stack: Stack) -> None:
    engine = new_engine(stack.address("http"), background=True)
    for params in ({"stop": ["a"]}, {"seed": 1}, {"logprobs": 1}, {"regex": "a"}):
        with pytest.raises(UnsupportedParams, match=rf"params\.{next(iter(params))}: the provider does not support"):
            await outputs(engine, llm_pb2.JobRequest(prompt="a", params={"max_tokens": 1, **params}))
    await engine.close()


def events(*items: dict[str, Any]) -> Any:
    async def answer(_: web.Request) -> web.Response:
        text = "".join(
            f"event: {item['type']}\ndata: {json.dumps({'sequence_number': number, **item})}\n\n"
            for number, item in enumerate(items)
        )
        return web.Response(text=text, content_type="text/event-stream")

    return answer


@asynccontextmanager
async def scripted(answer: Any) -> AsyncIterator[str]:
    """Run a provider that answers each response so."""
    app = web.Application()
    app.router.add_post("/v1/responses", answer)
    app.router.add_get("/v1/responses/{id}", answer)
    app.router.add_post("/v1/responses/{id}/cancel", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    try:
        yield f"{host}:{port}"
    finally:
        await runner.cleanup()


CREATED = {"type": "response.created", "response": {"id": "resp_1", "status": "queued"}}
DELTA = {"type": "response.output_text.delta", "delta": "a"}


def ended(kind: str, **members: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", "response": {"id": "resp_1", "status": kind, **members}}


@pytest.mark.parametrize(
    ("last", "error", "kept"),
    [
        (ended("failed", error={"code": "server_error", "message": "secret words"}), EngineFailed, ""),
        (ended("incomplete", incomplete_details={"reason": "content_filter"}), InvalidJob, "resp_1"),
        (ended("incomplete", status="cancelled"), EngineFailed, ""),
        ({"type": "response.refusal.delta", "delta": "no"}, InvalidJob, "resp_1"),
        ({"type": "error", "code": "server_error", "message": "secret words"}, EngineFailed, "resp_1"),
        (DELTA, EngineFailed, "resp_1"),
    ],
    ids=["failed", "filtered", "cancelled", "refused", "broken", "cut"],
)
async def test_an_end_that_is_none(last: dict[str, Any], error: type[Exception], kept: str) -> None:
    """A response that is over is not continued; one whose stream broke is."""
    async with scripted(events(CREATED, DELTA, last)) as address:
        engine, generation = background(address), Generation("1", job())
        with pytest.raises(error) as raised:
            _ = [output async for output in engine.generate(generation)]
        await engine.close()
    assert "secret" not in str(raised.value)
    assert generation.provider_response.response_id == kept


@pytest.mark.parametrize("status", [400, 404, 410])
async def test_a_response_that_cannot_be_read_on_is_begun_again(status: int) -> None:
    """A provider may keep a response, and its stream for a shorter time."""
    begun = events(CREATED, DELTA, ended("completed", usage=None))

    async def answer(request: web.Request) -> web.Response:
        return await begun(request) if request.method == "POST" else web.json_response({}, status=status)

    async with scripted(answer) as address:
        engine = background(address)
        left = internal_pb2.ProviderResponse(response_id="resp_0", sequence_number=9)
        generation = Generation("1", job())
        generation.provider_response.CopyFrom(left)
        assert text_of([output async for output in engine.generate(generation)]) == "a"
        continued = Generation("2", job(), (0,), "some")
        continued.provider_response.CopyFrom(left)
        with pytest.raises(CannotContinue):
            _ = [output async for output in engine.generate(continued)]
        await engine.close()
    assert not continued.provider_response.response_id


async def test_a_response_that_is_lost_from_its_beginning_is_begun_again() -> None:
    """Read again it would be lost again, and so on without a pause."""
    read: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        read.append(request.method)
        replaced = {"type": "error", "code": "output_replaced", "message": "replaced"}
        begun = (CREATED, DELTA, ended("completed", usage=None))
        return await (events(*begun) if request.method == "POST" else events(replaced))(request)

    async with scripted(answer) as address, asyncio.timeout(30):
        engine, generation = background(address), Generation("1", job())
        generation.provider_response.CopyFrom(internal_pb2.ProviderResponse(response_id="resp_0", sequence_number=9))
        assert text_of([output async for output in engine.generate(generation)]) == "a"
        await engine.close()
    assert read == ["GET", "GET", "POST"], "after the last event, from the beginning, another one"


async def test_a_response_that_ignores_max_tokens_is_cancelled() -> None:
    cancelled: list[str] = []
    begun = events(CREATED, *[DELTA] * 100)

    async def answer(request: web.Request) -> web.Response:
        if request.path.endswith("/cancel"):
            cancelled.append(request.path)
            return web.json_response({"id": "resp_1", "object": "response", "status": "cancelled"})
        return await begun(request)

    async with scripted(answer) as address, asyncio.timeout(30):
        engine = background(address)
        async with aclosing(engine.generate(Generation("1", job()))) as stream:
            async for output in stream:
                if output.finish_reason is not None:
                    # The attempt reads nothing after the end of the output.
                    break
        await engine.close()
    assert output.finish_reason == LENGTH
    assert cancelled == ["/v1/responses/resp_1/cancel"]


async def test_an_id_of_a_response_has_a_maximum_length() -> None:
    """It would be in every heartbeat."""
    async with scripted(events({**CREATED, "response": {"id": "r" * 2000, "status": "queued"}})) as address:
        engine, generation = background(address), Generation("1", job())
        with pytest.raises(EngineFailed, match="too long"):
            _ = [output async for output in engine.generate(generation)]
        await engine.close()
    assert not generation.provider_response.response_id


@pytest.mark.parametrize("way", ["no answer", "no event", "no end", "completion"])
async def test_a_silent_provider_is_given_up_in_time(way: str) -> None:
    """It has accepted the request, and says nothing: its connection stays open."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if way != "no answer":
            await response.prepare(request)
        if way == "no end":
            for number, item in enumerate((CREATED, DELTA)):
                text = json.dumps({**item, "sequence_number": number})
                await response.write(f"event: {item['type']}\ndata: {text}\n\n".encode())
        async with asyncio.timeout(60):
            # A comment is no message.
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.1)
                if way != "no answer":
                    await response.write(b": still here\n\n")
        return response

    limits = {"first_seconds": 0.5, "silence_seconds": 0.4}
    if way == "completion":
        async with provider(answer) as address, asyncio.timeout(30):
            engine: Engine = new_engine(address, **limits)
            with pytest.raises(EngineFailed, match=r"has accepted the request, and has sent nothing for 0\.5 s"):
                await outputs(engine, job())
            await engine.close()
        return
    async with scripted(answer) as address, asyncio.timeout(30):
        engine = background(address, **limits)
        seconds = "0.4" if way == "no end" else "0.5"
        with pytest.raises(EngineFailed, match=rf"has accepted the request, and has sent nothing for {seconds} s"):
            await outputs(engine, job())
        await engine.close()


@pytest.fixture(scope="module")
async def relay(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack whose two workers run their jobs at the stack of the tests, as another user each time."""
    options = {
        "base_url": f"http://{stack.address('http')}/v1",
        "context_tokens": 8192,
        "background": True,
        "dialect": "vllm",
        "extra_body": {"user": "relayed"},
    }
    worker = {
        **FAST["gpu-worker"],
        "GPU_WORKER_ENGINE_OPTIONS": json.dumps(options),
        "GPU_WORKER_MODEL_PATH": "docstrings",
        "GPU_WORKER_SHUTDOWN_GRACE": "PT0S",
    }
    gateway = {**FAST["gateway"], **SOON_LOST}
    settings = stack_settings(tmp_path_factory.mktemp("relay"), engine="openai", gpu_workers=2)
    only = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    environment = {**FAST, "gateway": gateway, "gpu-worker": worker}
    async with Stack(settings, only=only, environment=environment) as running:
        yield running


@pytest.mark.long
async def test_a_lost_workers_job_is_paid_once(relay: Stack, stub: LlmServiceStub) -> None:
    """`kill -9` in mid-stream, then SIGTERM: the provider runs one job each, and its text comes without a rewind."""
    params = {"max_tokens": TOKENS, "seed": 11}
    known = await jobs_of(stub, "relayed")
    temporal = await Client.connect(relay.address("temporal"))
    async with grpc.aio.insecure_channel(relay.address("gateway")) as channel:
        own = LlmServiceStub(channel)
        for how in ("kill", "terminate"):
            id_ = (await own.Submit(llm_pb2.SubmitRequest(job=new_job(how, params=params)))).workflow_id
            early = asyncio.create_task(watch(own, id_))
            pieces = asyncio.create_task(watch_in_pieces(own, id_, random.Random(1)))
            status = await when_output_reaches(own, id_, 300)

            async def known_to_temporal(id_: str = id_) -> bool:
                """A worker that is killed before Temporal has the id of the response pays twice."""
                raw = (await temporal.get_workflow_handle(id_).describe()).raw_description
                return any(
                    b"resp_" in data.data for run in raw.pending_activities for data in run.heartbeat_details.payloads
                )

            await until(known_to_temporal)
            pid = int(status.progress.worker.rpartition("-")[2])
            (worker,) = [process for process in relay.processes.values() if process.pid == pid]
            await (worker.kill() if how == "kill" else worker.terminate())
            seen = [await early, await pieces]
            await worker.start()
            used = workflow_id_of(seen[0].final.result.metadata.provider_response_id)

            async def listed(used: str = used) -> set[str] | None:
                found = await jobs_of(stub, "relayed")
                return found if used in found else None

            # A second job at the provider would be older than the worker that is lost.
            found = await until(listed)
            assert found - known == {used}, how
            known = found
            upstream = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=used))).result
            for watcher in seen:
                assert watcher.states[-1] == "SUCCEEDED"
                assert watcher.output == upstream.output.encode()
                assert watcher.rewinds == 0
            metadata = seen[0].final.result.metadata
            assert (metadata.output_tokens, metadata.wasted_tokens) == (TOKENS, 0)
            assert len(seen[0].final.result.attempts) == 2
            await worker.wait_ready()


@pytest.mark.long
async def test_a_cancelled_job_is_cancelled_at_the_provider(relay: Stack, stub: LlmServiceStub) -> None:
    async with grpc.aio.insecure_channel(relay.address("gateway")) as channel:
        own = LlmServiceStub(channel)
        id_ = (await own.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 8000})))).workflow_id
        await when_output_reaches(own, id_, 50)
        await own.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
        seen = await watch(own, id_)
    assert seen.states[-1] == "CANCELLED"
    upstream = workflow_id_of(seen.final.result.metadata.provider_response_id)
    assert (await watch(stub, upstream)).states[-1] == "CANCELLED"
