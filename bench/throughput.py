"""Whether the suite keeps the GPU busy: output tokens a second of vLLM through the whole stack.

All jobs are submitted together, each by a call of its own, and each is watched to its end. The suite, the limit and the
peer get the same prompts, greedy, up to the same number of tokens. They run in the same run, with the same engine
options, in separate processes, and only one of them works at a time. The limit is a bare AsyncLLM that gets all prompts
together. The peer is `vllm serve`, driven by its own client, `vllm bench serve`.

The default model is so small that its tokens cost little more than their way to the client, so it shows the cost of the
suite. `--layers SmolLM2-135M` gives it the layers of that model, one of the smallest in use, with random weights. Then
the engine has as much work as with that model.

Needs vLLM: run it in the environment of `make test-vllm` (CPU) or of `make test-gpu`. On a GPU:

    python -m bench.throughput --layers Llama-3.1-8B
"""

import asyncio
import inspect
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import grpc

from bench.peers import vllm_peers
from bench.peers.vllm_peers import BareVllm, VllmServe, with_layers, worker_environment
from bench.support import script
from bench.support.report import Report
from bench.support.stacks import new_stack
from bench.support.watched_job import finish, submit
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 2
    jobs: tuple[int, ...] = (64, 256)
    tokens: int = 512
    max_concurrent: int = 256
    model_path: str = "models/docstrings"
    layers: str = "its own"
    engine_options: str = "{}"


Way = Callable[[list[str], int], Awaitable[dict[str, float]]]
"""Generates for prompts, up to a number of tokens each; returns the figures."""
_PROMPT_CHARACTERS: Final = 200
_CLIENT_SECONDS: Final = 600


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "Does the suite keep the GPU busy?",
        "Output tokens a second, all jobs concurrently, from the first submission to the last end."
        f" vLLM's {'CPU' if vllm_peers.on_cpu() else 'GPU'} build, model {sizes.model_path},"
        f" a batch of {sizes.max_concurrent}.",
    )
    async with all_ways(sizes) as ways:
        for way in ways.values():
            await way(prompts(min(sizes.jobs)), sizes.tokens)
        for _ in range(sizes.rounds):
            for jobs in sizes.jobs:
                for who, way in ways.items():
                    report.add(f"{jobs} jobs", who, await way(prompts(jobs), sizes.tokens))
    for jobs in sizes.jobs:
        aim = 0.85 if vllm_peers.on_cpu() else 0.95
        report.ratio(f"{jobs} jobs", "tokens_per_second", "limit_bare_async_llm", at_least=aim)
        report.ratio(f"{jobs} jobs", "tokens_per_second", "peer_vllm_serve", at_least=1)
    return report


def prompts(count: int) -> list[str]:
    """Return `count` different prompts: pieces of the documentation of Python's built-in types."""
    texts = [
        text
        for kind in (str, bytes, list, dict, set, int, float)
        for name in sorted(vars(kind))
        if len(text := inspect.getdoc(getattr(kind, name)) or "") > _PROMPT_CHARACTERS / 4
    ]
    return [f"{number}. {texts[number % len(texts)][:_PROMPT_CHARACTERS]}" for number in range(count)]


@asynccontextmanager
async def all_ways(sizes: Sizes) -> AsyncIterator[dict[str, Way]]:
    """Run the stack and the peers, and yield the ways by name."""
    extra = with_layers(sizes.layers) | json.loads(sizes.engine_options)
    options = (sizes.model_path, sizes.max_concurrent, extra)
    async with AsyncExitStack() as opened:
        stack = opened.enter_context(new_stack({"gpu-worker": worker_environment(*options)}, engine="vllm"))
        await opened.enter_async_context(stack)
        channel = await opened.enter_async_context(grpc.aio.insecure_channel(stack.address("gateway")))
        bare = await opened.enter_async_context(BareVllm.running(*options))
        serve = await opened.enter_async_context(VllmServe.running(*options))
        yield {
            "suite": partial(suite, LlmServiceStub(channel)),
            "limit_bare_async_llm": bare.run,
            "peer_vllm_serve": serve.bench,
        }


async def suite(stub: LlmServiceStub, prompts: list[str], tokens: int) -> dict[str, float]:
    """Run a job for each prompt; return the figures."""
    params = llm_pb2.SamplingParams(max_tokens=tokens, temperature=0)

    async def run(prompt: str) -> int:
        ended = await finish(stub, await submit(stub, prompt=prompt, params=params))
        return ended.result.metadata.output_tokens

    begin = time.monotonic()
    async with asyncio.timeout(_CLIENT_SECONDS):
        made = sum(await asyncio.gather(*map(run, prompts)))
    return {"tokens_per_second": made / (time.monotonic() - begin), "output_tokens": made}


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, jobs=(4,), tokens=8, max_concurrent=4), __doc__)
