"""Behaviour of the torch engine alone: its sampling, its failures, and continuing sampled output.

The tests import torch, and not the module: every process of pytest-xdist imports all modules, and torch takes seconds.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from jobs.errors import EngineDead, EngineFailed, OutOfMemory, UnsupportedParams
from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import CannotContinue, EngineConfig, Generation, Output
from tests.support.paths import ROOT

if TYPE_CHECKING:
    import torch

    from services.gpu_worker.engines.torch import TorchEngine
    from services.gpu_worker.engines.torch_model import LoadedModel, TorchOptions

pytestmark = pytest.mark.heavy
MODEL = str(ROOT / "models" / "docstrings")
CONFIG = EngineConfig(MODEL, 3, {"device": "cpu", "threads": 1, "context_tokens": 512, "prefill_tokens": 8})


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[TorchEngine]:
    from services.gpu_worker.engines.torch import create

    engine = create(CONFIG)
    await engine.start()
    yield engine
    await engine.close()


def job(text: str = "Return the number of", **params: Any) -> llm_pb2.JobRequest:
    return llm_pb2.JobRequest(
        prompt=text, params=llm_pb2.SamplingParams(**{"max_tokens": 30, "min_tokens": 30, "temperature": 0, **params})
    )


async def outputs(
    engine: TorchEngine, request: llm_pb2.JobRequest, ids: tuple[int, ...] = (), text: str = ""
) -> list[Output]:
    return [output async for output in engine.generate(Generation("attempt", request, ids, text))]


def ids_of(made: list[Output]) -> tuple[int, ...]:
    return tuple(token for output in made for token in output.token_ids)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {
            "temperature": 1.0,
            "seed": 5,
            "json_schema": '{"type": "array", "items": {"type": "string"}, "minItems": 20}',
        },
    ],
    ids=["seeded", "narrowed", "penalised", "structured"],
)
async def test_what_was_drawn_or_penalised_is_continued_exactly(engine: TorchEngine, params: dict[str, Any]) -> None:
    request = job(**params)
    whole = await outputs(engine, request)
    for cut in (1, 13, 29):
        text = "".join(output.text for output in whole[:cut])
        assert ids_of(await outputs(engine, request, ids_of(whole[:cut]), text)) == ids_of(whole[cut:])


async def test_a_seed_draws_the_same_tokens_in_a_batch_as_alone(engine: TorchEngine) -> None:
    jobs = [job(temperature=1, seed=seed) for seed in (1, 2, 3)]
    alone = [ids_of(await outputs(engine, request)) for request in jobs]
    assert [ids_of(made) for made in await asyncio.gather(*(outputs(engine, request) for request in jobs))] == alone


async def test_without_a_seed_each_job_draws_its_own(engine: TorchEngine) -> None:
    assert ids_of(await outputs(engine, job(temperature=1))) != ids_of(await outputs(engine, job(temperature=1)))


async def test_tokens_of_another_model_cannot_be_continued(engine: TorchEngine) -> None:
    for ids in ((999_999,), (300, 301)):
        with pytest.raises(CannotContinue):
            await outputs(engine, job(), ids, "this was published")


def test_an_unset_parameter_is_the_models_own_default() -> None:
    from services.gpu_worker.engines.torch_sampling import Sampling, sampling_of

    defaults = {"temperature": 0.7, "top_p": 0.95}
    assert sampling_of(llm_pb2.SamplingParams(seed=1), defaults) == Sampling(seed=1, temperature=0.7, top_p=0.95)
    asked = llm_pb2.SamplingParams(seed=1, temperature=0, logprobs=0)
    assert sampling_of(asked, defaults) == Sampling(seed=1, temperature=0, top_p=0.95, logprobs=0)


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    """The scores of four tokens whose probabilities are 0.5, 0.3, 0.15 and 0.05."""
    import torch

    return torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


@pytest.mark.parametrize(
    ("narrowing", "left"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.79}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"top_p": 0.01}, [0]),
        ({"min_p": 0.4}, [0, 1]),
        ({"min_p": 1.0}, [0]),
    ],
)
def test_narrowing_keeps_the_likeliest(scores: torch.Tensor, narrowing: dict[str, Any], left: list[int]) -> None:
    from services.gpu_worker.engines.torch_sampling import Sampling, candidates

    assert candidates(scores, Sampling(seed=0, **narrowing)).nonzero().flatten().tolist() == left


def test_tokens_are_drawn_as_often_as_they_are_likely(scores: torch.Tensor) -> None:
    import torch

    from services.gpu_worker.engines.torch_sampling import Sampling, SamplingContext, choose

    drawn = [choose(scores, Sampling(seed=1), SamplingContext([], [0] * position, [])) for position in range(4000)]
    shares = torch.tensor(drawn).bincount(minlength=4) / len(drawn)
    assert torch.allclose(shares, scores.exp(), atol=0.03)


def test_penalties_count_what_they_say() -> None:
    import torch

    from services.gpu_worker.engines.torch_sampling import Sampling, SamplingContext, choose

    context = SamplingContext(prompt=[0], output=[1, 1], end_ids=[])

    def after(**penalty: Any) -> list[int]:
        scores = torch.tensor([3.0, 2.9, 2.0, 1.0])
        ordered: list[int] = []
        while len(ordered) < 4:
            ordered.append(choose(scores, Sampling(seed=0, temperature=0, **penalty), context))
            scores[ordered[-1]] = -1e9
        return ordered

    assert after() == [0, 1, 2, 3]
    assert after(presence_penalty=1.0) == [0, 2, 1, 3], "the penalty is 1.0 once"
    assert after(frequency_penalty=1.0) == [0, 2, 3, 1], "the penalty is 1.0 for each occurrence"
    assert after(repetition_penalty=1.6) == [2, 0, 1, 3], "the prompt's token is penalised, too"
    assert after(presence_penalty=-1.0) == [1, 0, 2, 3]


def test_no_end_is_chosen_before_min_tokens(scores: torch.Tensor) -> None:
    from services.gpu_worker.engines.torch_sampling import Sampling, SamplingContext, choose

    sampling = Sampling(seed=0, temperature=0, min_tokens=2)
    assert choose(scores, sampling, SamplingContext([], [2], end_ids=[0, 1])) == 2
    assert choose(scores, sampling, SamplingContext([], [2, 2], end_ids=[0, 1])) == 0


Before = Callable[[int, int], None]


class Watched:
    """A model that calls `before` ahead of each step, with the number of rows and of tokens in a row."""

    def __init__(self, loaded: LoadedModel, before: Before) -> None:
        self._model = loaded.model
        self._before = before
        self.device, self.config = loaded.model.device, loaded.model.config
        self.forward = loaded.model.forward

    def __call__(self, **arguments: Any) -> Any:
        self._before(*arguments["input_ids"].shape)
        return self._model(**arguments)


async def watched_engine(before: Before) -> TorchEngine:
    from services.gpu_worker.engines.torch import TorchEngine
    from services.gpu_worker.engines.torch_model import TorchOptions, load_model

    def load(path: str, options: TorchOptions) -> LoadedModel:
        loaded = load_model(path, options)
        return replace(loaded, model=Watched(loaded, before))

    engine = TorchEngine(CONFIG, TorchOptions(**CONFIG.options), load)
    await engine.start()
    return engine


async def test_a_cancelled_generation_is_out_of_the_batch_within_one_step() -> None:
    steps: list[tuple[int, int]] = []
    engine = await watched_engine(lambda rows, tokens: steps.append((rows, tokens)))
    kept, cancelled = (
        engine.generate(Generation(text, job(text, max_tokens=150, min_tokens=150))) for text in ("Return", "class ")
    )
    for stream in (kept, cancelled):
        while not (await anext(stream)).token_ids:
            pass
    await cancelled.aclose()
    seen = len(steps)
    assert len([output async for output in kept]) == 149
    assert {rows for rows, _ in steps[seen + 1 :]} == {1}
    await engine.close()


async def test_a_generation_cancelled_while_its_prompt_is_read_is_read_no_further() -> None:
    loop, begun, steps = asyncio.get_running_loop(), asyncio.Event(), []

    def before(_: int, tokens: int) -> None:
        steps.append(tokens)
        loop.call_soon_threadsafe(begun.set)

    engine = await watched_engine(before)
    steps.clear()
    begun.clear()
    reading = asyncio.create_task(outputs(engine, job("word " * 150)))
    await begun.wait()
    reading.cancel()
    await asyncio.wait([reading])
    seen = len(steps)
    assert len(ids_of(await outputs(engine, job()))) == 30
    assert steps[seen + 1 :].count(8) == 0, "the engine read on in the cancelled prompt"
    await engine.close()


async def test_too_little_memory_for_a_batch_ends_the_last_to_join_and_changes_no_other() -> None:
    import torch

    def before(rows: int, _: int) -> None:
        if rows == 3:
            torch.empty(1 << 60)  # more than the machine has, so that the allocator itself fails

    engine = await watched_engine(before)
    jobs = [job(text) for text in ("Return", "class ", "A list of")]
    alone = [ids_of(await outputs(engine, request)) for request in jobs]
    ended = await asyncio.gather(*(outputs(engine, request) for request in jobs), return_exceptions=True)
    (last,) = (place for place, end in enumerate(ended) if isinstance(end, OutOfMemory))
    for place, made in enumerate(ended):
        assert place == last or (isinstance(made, list) and ids_of(made) == alone[place])
    assert ids_of(await outputs(engine, jobs[last])) == alone[last], "the engine must still serve"
    await engine.close()


async def test_an_error_of_the_model_fails_the_generations_in_the_step_and_the_engine_lives_on() -> None:
    fails = True

    def before(rows: int, _: int) -> None:
        if rows == 2 and fails:
            raise IndexError("scripted")

    engine = await watched_engine(before)
    jobs = [job(text) for text in ("a", "b")]
    ended = await asyncio.gather(*(outputs(engine, request) for request in jobs), return_exceptions=True)
    assert [type(error) for error in ended] == [EngineFailed, EngineFailed]
    assert "IndexError: scripted" in str(ended[0])
    fails = False
    assert all(await asyncio.gather(*(outputs(engine, request) for request in jobs)))
    assert not engine.dead.is_set()
    await engine.close()


async def test_an_error_of_the_device_ends_the_engine() -> None:
    import torch

    def before(*_: int) -> None:
        raise torch.AcceleratorError("scripted")

    engine = await watched_engine(before)
    with pytest.raises(EngineDead, match="scripted"):
        await outputs(engine, job())
    await engine.dead.wait()
    with pytest.raises(EngineDead):
        await outputs(engine, job())
    await engine.close()


async def test_output_of_another_form_cannot_be_continued(engine: TorchEngine) -> None:
    whole = await outputs(engine, job())
    with pytest.raises(CannotContinue):
        await outputs(engine, job(regex="[0-9]+", min_tokens=1), ids_of(whole[:5]))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"properties": {"a": {"anyOf": [{"type": "null"}, {"type": "string", "not": {"const": "x"}}]}}},
        {"minLength": 3},
        {"type": "string", "pattern": "^a+$", "maxLength": 2},
        {"allOf": [{"type": "integer"}, {"minimum": 4}]},
        {"$ref": "https://example.com/schema"},
    ],
)
async def test_a_schema_that_would_be_kept_in_part_is_refused(engine: TorchEngine, schema: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParams, match="json_schema: the torch engine does not support"):
        await outputs(engine, job(json_schema=json.dumps(schema)))


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}])
@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_schema_that_nothing_keeps_is_refused(
    engine: TorchEngine, schema: dict[str, Any], temperature: int
) -> None:
    """It failed as the engine's fault, and was tried again."""
    with pytest.raises(UnsupportedParams, match="allows no output"):
        await outputs(engine, job(json_schema=json.dumps(schema), temperature=temperature))


async def test_what_is_wrong_with_a_schema_is_told_in_one_line(engine: TorchEngine) -> None:
    schema = {"type": "integer", "minimum": 5, "maximum": 1}
    with pytest.raises(UnsupportedParams, match=r"^params\.json_schema: Invalid range: [^\n]*$"):
        await outputs(engine, job(json_schema=json.dumps(schema)))


async def test_names_and_values_in_a_schema_are_no_keywords(engine: TorchEngine) -> None:
    schema = {"type": "object", "properties": {"not": {"const": {"not": 1}}}, "required": ["not"]}
    made = await outputs(engine, job(json_schema=json.dumps(schema), min_tokens=0))
    assert json.loads("".join(output.text for output in made)) == {"not": {"not": 1}}


async def test_a_form_that_slows_the_batch_ends_alone(engine: TorchEngine) -> None:
    """The gateway refuses such expressions. One that it does not see through ends at the engine."""
    neighbour = asyncio.create_task(outputs(engine, job(max_tokens=120, min_tokens=120)))
    with pytest.raises(UnsupportedParams, match=r"params\.regex slowed every job of its batch"):
        await outputs(engine, job(regex=r"(\w{1,500} ?){1,500}", max_tokens=400, min_tokens=400))
    assert len(ids_of(await neighbour)) == 120
