"""Behaviour of the simulated engine alone: its pace and its scripted faults."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from jobs.errors import EngineDead, EngineFailed, JobError, OutOfMemory
from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import CannotContinue, EngineConfig, Generation, Output
from services.gpu_worker.engines.simulated import EARLY_SECONDS, SimulatedEngine, create, decode


def engine(places: int = 4, **options: Any) -> SimulatedEngine:
    return create(EngineConfig("any", places, {"tokens_per_second": 2000, **options}))


def job(prompt: str = "Hello", **params: Any) -> llm_pb2.JobRequest:
    return llm_pb2.JobRequest(
        user_id="u", request_id="r", prompt=prompt, params=llm_pb2.SamplingParams(**{"max_tokens": 50, **params})
    )


async def run(
    engine: SimulatedEngine, request: llm_pb2.JobRequest, before: list[Output] | None = None
) -> tuple[list[Output], JobError | None]:
    """Run an attempt that continues `before`; return its outputs and the error with which it failed."""
    before = before or []
    ids = tuple(token for output in before for token in output.token_ids)
    text = "".join(output.text for output in before)
    made: list[Output] = []
    try:
        async for output in engine.generate(Generation("attempt", request, ids, text)):
            if output.token_ids:
                made.append(output)
    except JobError as error:
        return made, error
    return made, None


async def test_the_text_is_the_same_in_every_process_and_mixes_scripts() -> None:
    made, _ = await run(engine(), job("Hello", seed=3))
    text = "".join(output.text for output in made)
    again, _ = await run(engine(), job("Hello", seed=3))
    other, _ = await run(engine(), job("Hello", seed=4))
    assert made == again != other
    assert not text.isascii()
    assert "\ufffd" not in text
    assert "" in [output.text for output in made], "a token that ends within a character gives no text"


async def test_a_long_text_holds_no_replaced_character() -> None:
    for seed in range(6):
        made, _ = await run(engine(), job("Hello", seed=seed, max_tokens=400))
        text, tokens = "".join(output.text for output in made), [token for output in made for token in output.token_ids]
        assert "\ufffd" not in text
        assert text == decode(tokens).rstrip("\ufffd"), "only a character that max_tokens cut may be missing"


@pytest.mark.parametrize(("kind", "error"), [("oom", OutOfMemory), ("failed", EngineFailed), ("die", EngineDead)])
async def test_a_scripted_fault_strikes_after_so_many_tokens(kind: str, error: type[JobError]) -> None:
    simulated = engine()
    made, failure = await run(simulated, job(f"Hello [[fault:{kind}@7]]"))
    assert len(made) == 7
    assert type(failure) is error
    assert simulated.dead.is_set() == (kind == "die")


async def test_a_fault_of_the_options_strikes_every_job_that_scripts_none() -> None:
    simulated = engine(fault="oom@3")
    assert len((await run(simulated, job()))[0]) == 3
    assert len((await run(simulated, job("[[fault:oom@5]]")))[0]) == 5


async def test_a_fault_meant_once_spares_the_next_attempt() -> None:
    simulated, request = engine(), job("[[fault:failed@7:once]]")
    first, failure = await run(simulated, request)
    assert failure is not None
    started_over, failure = await run(simulated, request)
    assert (len(started_over), failure) == (50, None)
    continued, failure = await run(engine(), request, first)
    assert (first + continued, failure) == (started_over, None)


async def test_a_hang_ends_by_cancelling_only() -> None:
    simulated = engine(places=1)
    stream = simulated.generate(Generation("attempt", job("[[fault:hang@2]]")))
    assert [len((await anext(stream)).token_ids) for _ in range(3)] == [0, 1, 1]
    hanging = asyncio.ensure_future(anext(stream))
    waiting = asyncio.create_task(run(simulated, job()))
    done, _ = await asyncio.wait([hanging, waiting], timeout=0.1)
    assert not done
    hanging.cancel()
    assert len((await waiting)[0]) == 50


async def test_one_that_dies_takes_the_others_with_it() -> None:
    simulated = engine()
    ends = await asyncio.gather(run(simulated, job("[[fault:die@5]]")), run(simulated, job(max_tokens=4000)))
    assert [type(failure) for _, failure in ends] == [EngineDead, EngineDead]


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_tokens_come_at_the_pace_asked_for_however_many_generations_run(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """No token is early, neither on asyncio's own event loop nor on uvloop, which the services use."""

    async def took(simulated: SimulatedEngine) -> float:
        begin = time.monotonic()
        await run(simulated, job(max_tokens=21))
        return time.monotonic() - begin

    async def all_at_once() -> list[float]:
        simulated = engine(places=50, tokens_per_second=100, prefill_seconds=0.1)
        return await asyncio.gather(*(took(simulated) for _ in range(50)))

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        seconds = runner.run(all_at_once())
    assert min(seconds) > 0.3 - EARLY_SECONDS, "0.1 s of prefill, then twenty pauses of 10 ms"
    assert max(seconds) < 40, "the generations run concurrently: in sequence they would take 15 s on an idle machine"


async def test_an_answer_can_have_an_end_of_its_own() -> None:
    made, _ = await run(engine(answer_tokens=9), job())
    assert (len(made), made[-1].finish_reason) == (10, llm_pb2.FINISH_REASON_STOP)


async def test_tokens_of_another_prompt_cannot_be_continued() -> None:
    made, _ = await run(engine(), job("one", max_tokens=5))
    with pytest.raises(CannotContinue):
        await run(engine(), job("two"), made)


@pytest.mark.parametrize("options", [{"fault": "explode@3"}, {"tokens_per_second": 0}, {"unknown": 1}])
def test_a_bad_option_is_a_value_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        engine(**options)
