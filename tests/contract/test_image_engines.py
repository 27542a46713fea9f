"""The contract of an image engine, on which the worker relies. Every one of them must keep it."""

import asyncio
import base64
import importlib.util
import itertools
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from jobs.errors import BudgetSpent, EngineDead, EngineFailed, InvalidJob, UnsupportedParams
from llm_pb import common_pb2, llm_pb2
from services.gpu_worker.engines.engine import CannotContinue, Engine, EngineConfig, Generation, Output, create_engine
from services.gpu_worker.engines.simulated_images import png
from tests.support.tiny_diffusion import write_tiny_model

OPTIONS: dict[str, dict[str, Any]] = {
    "simulated-images": {"width": 64, "height": 48},
    # The address of a provider is added.
    "openai-images": {"width": 64, "height": 48, "takes_seed": True},
    "diffusers": {"width": 64, "height": 48, "device": "cpu", "dtype": "float32", "steps": 2},
}
NAMES = [
    "simulated-images",
    "openai-images",
    pytest.param(
        "diffusers",
        marks=[
            pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="diffusers is not installed"),
            # The packages cause warnings of their own.
            pytest.mark.filterwarnings("default"),
        ],
    ),
]
PROMPT = "A harbour at night, 🚢 and é"
_numbers = itertools.count()


class Provider:
    """A server of OpenAI's Images API that draws what the simulated engine draws."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Any = None
        """What it answers instead of an image."""
        self.waits = asyncio.Event()
        self.waits.set()

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append({**body, "key": request.headers.get("Authorization", "")})
        await self.waits.wait()
        if self.answer is not None:
            status, answer = self.answer
            return web.json_response(answer, status=status, headers={"retry-after": "7"})
        width, height = (int(side) for side in body["size"].split("x"))
        data = png(body["prompt"], width, height, body.get("seed", 0))
        return web.json_response(
            {
                "created": 1,
                "data": [{"b64_json": base64.b64encode(data).decode()}],
                "usage": {"input_tokens": 5, "output_tokens": 17, "total_tokens": 22, "cost": 0.04},
            }
        )


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    provider = Provider()
    app = web.Application()
    app.router.add_post("/v1/images/generations", provider.generate)
    app.router.add_get("/v1/models", provider.models)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    OPTIONS["openai-images"]["base_url"] = f"http://{host}:{port}/v1"
    yield provider
    provider.waits.set()
    await runner.cleanup()


def new_engine(name: str, model: str = "painter", **options: Any) -> Engine:
    return create_engine(name, EngineConfig(model, 2, {**OPTIONS[name], **options}))


@pytest.fixture(params=NAMES)
async def engine(request: pytest.FixtureRequest, provider: Provider, tmp_path: Path) -> AsyncIterator[Engine]:
    model = write_tiny_model(tmp_path) if request.param == "diffusers" else "painter"
    engine = new_engine(request.param, model)
    await engine.start()
    yield engine
    await engine.close()


def job(prompt: str = PROMPT, seed: int | None = 5, **changes: Any) -> llm_pb2.JobRequest:
    params = llm_pb2.SamplingParams(max_tokens=3, seed=seed)
    return llm_pb2.JobRequest(user_id="u", request_id="r", model="painter", prompt=prompt, params=params, **changes)


async def outputs(engine: Engine, request: llm_pb2.JobRequest, ids: tuple[int, ...] = ()) -> list[Output]:
    return [output async for output in engine.generate(Generation(f"attempt-{next(_numbers)}", request, ids))]


async def image(engine: Engine, request: llm_pb2.JobRequest) -> bytes:
    made = await outputs(engine, request)
    assert made[-1].image is not None
    return made[-1].image.data


def size_of(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


async def test_only_the_last_output_has_the_image(engine: Engine) -> None:
    made = await outputs(engine, job())
    assert made[0] == Output("", (), 0)
    assert {(output.text, output.token_ids, output.finish_reason, output.image) for output in made[:-1]} == {
        ("", (), None, None)
    }
    last = made[-1]
    assert last.finish_reason == llm_pb2.FINISH_REASON_STOP
    assert last.image is not None
    assert last.image.media_type == "image/png"
    assert last.image.data.startswith(b"\x89PNG")
    assert size_of(last.image.data) == (64, 48)


async def test_an_image_is_a_function_of_prompt_size_and_seed(engine: Engine) -> None:
    first, again, other, seeded = [
        await image(engine, request) for request in (job(), job(), job("Another one"), job(seed=6))
    ]
    assert first == again
    assert len({first, other, seeded}) == 3
    wide = await image(engine, job(image_size=llm_pb2.ImageSize(width=96, height=32)))
    assert size_of(wide) == (96, 32)


async def test_an_image_is_started_over_and_bounded_by_a_budget(engine: Engine) -> None:
    with pytest.raises(CannotContinue):
        await outputs(engine, job(), (0, 0, 0))
    with pytest.raises(BudgetSpent):
        await outputs(engine, job(budget=common_pb2.Budget(output_tokens=2)))
    with pytest.raises(InvalidJob):
        await outputs(engine, job(prompt=""))


async def test_closing_ends_what_runs_and_frees_its_place(provider: Provider) -> None:
    provider.waits.clear()
    engine = new_engine("openai-images")
    async with aclosing(engine.generate(Generation("given-up", job()))) as stream:
        await anext(stream)
        await anext(stream)
        assert engine.load().running == 1
    assert engine.load() == (0, 0, 0.0)
    running = asyncio.create_task(outputs(engine, job()))
    while not engine.load().running:  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(EngineDead):
        await running
    with pytest.raises(EngineFailed, match="not done within"):
        await outputs(new_engine("simulated-images", seconds=60, timeout=0.1), job())


def test_the_simulated_image_is_a_png_as_the_standard_says() -> None:
    data = png(PROMPT, 100, 60, 1)
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size], "big") == zlib.crc32(kind + content)
        chunks.append((kind, content))
        at += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    lines = zlib.decompress(chunks[2][1])
    assert len(lines) == 60 * (1 + 3 * 100)
    assert {lines[at] for at in range(0, len(lines), 301)} == {0}
    assert len({lines[at : at + 3] for line in range(60) for at in range(line * 301 + 1, line * 301 + 301, 3)}) == 2


async def test_a_provider_gets_what_it_knows_and_says_what_an_image_cost(provider: Provider, tmp_path: Any) -> None:
    key = tmp_path / "key"
    key.write_text("secret-1\n")
    engine = new_engine("openai-images", api_key_file=key, extra_body={"quality": "low"})
    last = (await outputs(engine, job()))[-1]
    assert (last.prompt_tokens, len(last.token_ids), last.cost_micros) == (5, 17, 40_000)
    asked = {"model": "painter", "prompt": PROMPT, "n": 1, "size": "64x48", "seed": 5, "quality": "low"}
    assert provider.requests == [{**asked, "key": "Bearer secret-1"}]
    await engine.close()
    engine = new_engine("openai-images", takes_seed=False)
    with pytest.raises(UnsupportedParams, match=r"params\.seed"):
        await outputs(engine, job())
    assert await image(engine, job(seed=None))
    await engine.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((429, {"error": {"message": PROMPT, "code": "rate_limit"}}), EngineFailed),
        ((400, {"error": {"message": PROMPT, "code": "content_policy_violation"}}), UnsupportedParams),
        ((200, {"created": 1, "data": [{"url": "http://127.0.0.1/x.png"}]}), EngineFailed),
        ((200, {"created": 1, "data": []}), EngineFailed),
        ((200, {"created": 1, "data": [{"b64_json": "no base64!"}]}), EngineFailed),
        ((200, {"created": 1, "data": [{"b64_json": base64.b64encode(b"<svg>").decode()}]}), EngineFailed),
        ((200, ["nothing"]), EngineFailed),
        ((200, {"created": 1, "data": [{"b64_json": "A" * 5000}]}), EngineFailed),
    ],
)
async def test_a_provider_that_sends_no_image_fails_the_attempt(
    provider: Provider, answer: Any, error: type[Exception]
) -> None:
    """Its words may hold the prompt, so they are in no error."""
    provider.answer = answer
    engine = new_engine("openai-images", max_answer_bytes=4000)
    with pytest.raises(error) as caught:
        await outputs(engine, job())
    assert PROMPT not in str(caught.value)
    if answer[0] == 429:
        assert caught.value.retry_after.total_seconds() == 7  # type: ignore[attr-defined]
    await engine.close()


@pytest.mark.heavy
async def test_the_engine_diffusers_says_what_it_lacks() -> None:
    if importlib.util.find_spec("diffusers"):
        pytest.skip("diffusers is installed")
    engine = new_engine("diffusers")
    with pytest.raises(EngineDead, match="the extra diffusers"):
        await engine.start()
    await engine.close()
