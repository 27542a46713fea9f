"""The engine openai with providers that misbehave: attempts end, within bounds, without the words of the provider."""

import contextlib
import json
import math
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from temporalio.api.failure.v1 import Failure

from jobs.application_errors import to_attempt_error
from jobs.errors import EngineFailed, InvalidJob, UnsupportedParams
from payload_converter import data_converter
from tests.stack.test_openai_engine import LENGTH, SECRET, job, new_engine, outputs, piece, provider, streaming, text_of


@pytest.mark.parametrize("after", ["inf", "1e999", "nan", "-1", "", "0x10"])
async def test_no_wait_is_one_that_a_provider_may_not_ask_for(after: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({}, status=429, headers={"Retry-After": after})

    async with provider(answer) as address:
        engine = new_engine(address)
        with pytest.raises(EngineFailed, match="HTTP 429") as refused:
            await outputs(engine, job())
        await engine.close()
    assert refused.value.retry_after in (None, timedelta(hours=1))


async def test_a_wait_may_be_a_date() -> None:
    async def answer(_: web.Request) -> web.Response:
        when = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
        return web.json_response({}, status=503, headers={"Retry-After": when})

    async with provider(answer) as address:
        engine = new_engine(address)
        with pytest.raises(EngineFailed) as refused:
            await outputs(engine, job())
        await engine.close()
    assert refused.value.retry_after is not None
    assert timedelta(minutes=3) < refused.value.retry_after <= timedelta(minutes=5)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -5, "completion_tokens": -7},
        {"prompt_tokens": 10**15, "completion_tokens": 10**15},
        {"prompt_tokens": "many", "completion_tokens": None},
        {"prompt_tokens": 1.5, "completion_tokens": math.nan, "cost": math.nan},
        {"completion_tokens": True, "prompt_tokens_details": {"cached_tokens": -3}, "cost": -1},
        {"prompt_tokens": 5, "prompt_tokens_details": "none", "cost": "free"},
    ],
    ids=repr,
)
async def test_a_count_that_cannot_be_is_not_believed(usage: dict[str, Any]) -> None:
    """A worker that believed in 10**15 tokens had no memory left."""
    async with provider(streaming(piece("a"), piece("b", "stop"), {"usage": usage})) as address:
        engine = new_engine(address)
        made = await outputs(engine, job())
        await engine.close()
    last = made[-1]
    assert text_of(made) == "ab"
    assert sum(len(output.token_ids) for output in made) == 2
    assert last.prompt_tokens in (0, 5)
    assert (last.cached_prompt_tokens, last.cost_micros) == (0, None)


async def test_a_provider_that_never_ends_is_cut_at_max_tokens() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(f"data: {json.dumps(piece('x'))}\n\n".encode())
        return response

    async with provider(answer) as address:
        engine = new_engine(address)
        made = await outputs(engine, job(max_tokens=12))
        await engine.close()
    assert made[-1].finish_reason == LENGTH
    assert 12 <= sum(len(output.token_ids) for output in made) < 12 * 20


async def test_a_message_without_an_end_is_given_up() -> None:
    """It would fill the worker's memory."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await response.write(b"data: ")
            for _ in range(200):
                await response.write(b"x" * 1_000_000)
        return response

    async with provider(answer) as address:
        engine = new_engine(address)
        with pytest.raises(EngineFailed, match="too large"):
            await outputs(engine, job())
        await engine.close()


@pytest.mark.parametrize("status", [400, 500])
async def test_an_answer_without_an_end_is_given_up(status: int) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": "text/html"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                await response.write(b"<p>" * 300_000)
        return response

    async with provider(answer) as address:
        engine = new_engine(address)
        with pytest.raises(EngineFailed, match="too large"):
            await outputs(engine, job())
        await engine.close()


async def test_a_refusal_is_no_empty_answer() -> None:
    refusal: dict[str, Any] = {"choices": [{"index": 0, "delta": {"refusal": SECRET}, "finish_reason": "stop"}]}
    async with provider(streaming(refusal)) as address:
        engine = new_engine(address)
        with pytest.raises(InvalidJob, match="refuses") as refused:
            await outputs(engine, job())
        await engine.close()
    assert SECRET not in str(refused.value)


async def test_the_words_of_a_provider_are_in_no_error(tmp_path: Path) -> None:
    """Nor in what an error says of its cause, which Temporal keeps. They may hold the prompt or the key."""

    async def answer(_: web.Request) -> web.Response:
        content = {"error": {"message": SECRET, "code": f"Wrong key: {SECRET}", "param": SECRET * 1000}}
        return web.json_response(content, status=401)

    ended = piece("a")
    ended["choices"][0]["finish_reason"] = f"because of {SECRET}"
    for response in (answer, streaming(ended), streaming(end=f'data: {{"error": {{"message": "{SECRET}"}}}}\n\n')):
        async with provider(response) as address:
            engine = new_engine(address)
            with pytest.raises(EngineFailed) as refused:
                await outputs(engine, job())
            await engine.close()
        kept = Failure()
        await data_converter.encode_failure(to_attempt_error(refused.value), kept)
        assert SECRET not in str(refused.value)
        assert SECRET not in str(kept)
    key = tmp_path / "key"
    key.write_text(f"sk-{SECRET}\nsk-{SECRET}")
    engine = new_engine("127.0.0.1:1", api_key_file=str(key))
    with pytest.raises(EngineFailed) as refused:
        await outputs(engine, job())
    await engine.close()
    assert SECRET not in "".join(traceback.format_exception(refused.value))


async def test_tokens_count_where_the_provider_returns_no_log_probabilities() -> None:
    async with provider(streaming(piece("a"), piece("b", "stop"))) as address:
        engine = new_engine(address)
        with pytest.raises(UnsupportedParams, match=r"params\.logprobs"):
            await outputs(engine, job(logprobs=1))
        await engine.close()


async def test_another_choice_is_not_mixed_in() -> None:
    """Nobody has asked for it."""
    other: dict[str, Any] = {"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": None}]}
    async with provider(streaming(piece("a"), other, piece("b", "stop"))) as address:
        engine = new_engine(address)
        made = await outputs(engine, job())
        await engine.close()
    assert text_of(made) == "ab"
