"""What the HTTP front costs more than gRPC: milliseconds until the first token, and the age of a token at the client.

The same jobs of the same stack are read in turn through the HTTP front and from the gateway:

- suite: `/v1/completions` of the front, streamed;
- suite_responses: `/v1/responses` of the front, streamed, in the background;
- peer_grpc: Submit and StreamStatus of the gateway;
- peer_vllm_serve: `/v1/completions` of `vllm serve`, where vLLM is installed, with an engine that generates stamps;
- floor_bare_sse: a Starlette application that streams stamps and has nothing behind it.

`first token` is from the request to the first text, one job after another, with the ways in turn. `N streams` is from
the engine's yield to the client's read, as in bench.token_latency, which says how stamps show it. All over loopback,
without TLS, with the default settings except the size of the worker's batch. The HTTP client is aiohttp, for all alike.

    python -m bench.http_front
"""

import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import aiohttp
import grpc

from bench.peers import vllm_peers
from bench.peers.vllm_peers import VllmServe
from bench.support import script
from bench.support.openai_streams import completion, response
from bench.support.report import Report, quantiles, rotated
from bench.support.stacks import beside, new_stack, simulated
from bench.support.stamps import Read, read_stamps
from bench.support.watched_job import DEADLINE_SECONDS, MODEL, messages, submit
from bench.token_latency import PER_SECOND, Source, measure
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 5
    jobs: int = 30
    streams: tuple[int, ...] = (1, 64)
    tokens: int = 60
    tokens_more: int = 300


Way = Callable[[int], AsyncIterator[str]]
"""Runs a job with a number of tokens, and yields its texts as they arrive."""
PROMPT: Final = "x"
GRPC: Final = "peer_grpc"
FRONTS: Final = ("suite", "suite_responses")
AIM_MS_OVER_GRPC: Final = 2


async def report_of(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "What does the HTTP front cost over gRPC?",
        "ms from the request to the first text, and from the engine's yield to the client's read,"
        f" {PER_SECOND} tokens a second and stream.",
    )
    async with all_ways(max(sizes.streams)) as ways:
        for way in ways.values():
            # The first jobs of a process fill its caches.
            for _ in range(3):
                await first_token(way)
        for number in range(sizes.rounds):
            for name, took in (await first_tokens(ways, sizes.jobs)).items():
                report.add("first token", name, quantiles(took))
            # The first of a round may find less other load, so the order rotates.
            for name in rotated(ways, number):
                for streams in sizes.streams:
                    tokens = sizes.tokens + sizes.tokens_more * streams // 64
                    report.add(f"{streams} streams", name, await measure(ages(ways[name]), streams, tokens))
    for case in ("first token", *(f"{streams} streams" for streams in sizes.streams)):
        for front in FRONTS:
            pairs = zip(report.rounds(case, front, "p50"), report.rounds(case, GRPC, "p50"), strict=True)
            what = f"p50 in ms, {front} - {GRPC}, {case}"
            report.judge(what, [ours - theirs for ours, theirs in pairs], at_most=AIM_MS_OVER_GRPC)
        report.ratio(case, "p50", "peer_vllm_serve")
        report.ratio(case, "p50", "floor_bare_sse")
    return report


@asynccontextmanager
async def all_ways(most_streams: int) -> AsyncIterator[dict[str, Way]]:
    """Run the stack and the peers, and yield the ways by name."""
    worker = simulated(tokens_per_second=PER_SECOND) | {"GPU_WORKER_MAX_CONCURRENT": str(most_streams)}
    async with AsyncExitStack() as opened:
        stack = opened.enter_context(new_stack({"gpu-worker": worker}))
        stack.processes["gpu-worker"].command = (sys.executable, "-m", "bench.peers.stamping_worker")
        stack.add("http")
        await opened.enter_async_context(stack)
        sse = await opened.enter_async_context(beside("bench.peers.bare_sse", str(PER_SECOND)))
        channel = await opened.enter_async_context(grpc.aio.insecure_channel(stack.address("gateway")))
        # Uvicorn closes what has been idle for 5 s. A request that it meets then is not sent again.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
        timeout = aiohttp.ClientTimeout(DEADLINE_SECONDS)
        session = await opened.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        front, bare = f"http://{stack.address('http')}", f"http://127.0.0.1:{sse.ready}"
        ways: dict[str, Way] = {
            "suite": lambda tokens: completion(session, front, MODEL, PROMPT, tokens),
            "suite_responses": lambda tokens: response(session, front, MODEL, PROMPT, tokens),
            GRPC: by_grpc(LlmServiceStub(channel)),
        }
        if vllm_peers.installed():
            command = ("bench.peers.stamping_vllm_serve", str(PER_SECOND))
            serve = await opened.enter_async_context(
                VllmServe.running("models/docstrings", most_streams, command=command)
            )
            ways["peer_vllm_serve"] = lambda tokens: serve.texts(PROMPT, tokens)
        ways["floor_bare_sse"] = lambda tokens: completion(session, bare, MODEL, PROMPT, tokens)
        yield ways


def by_grpc(stub: LlmServiceStub) -> Way:
    """Return the way from the gateway, without the front."""

    async def texts(tokens: int) -> AsyncIterator[str]:
        id_ = await submit(stub, tokens=tokens, prompt=PROMPT)
        async for message in messages(stub, id_):
            yield message.delta.text

    return texts


def ages(way: Way) -> Source:
    """Return a way as a source of bench.token_latency."""

    async def read(tokens: int) -> list[Read]:
        return [stamp async for text in way(tokens) for stamp in read_stamps(text)]

    return read


async def first_tokens(ways: dict[str, Way], jobs: int) -> dict[str, list[float]]:
    """Run jobs one after another to their ends; return the milliseconds until the first text of each.

    The ways take turns job by job: what else runs on the machine changes from minute to minute, by more than the ways
    differ.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(jobs):
        for name in rotated(ways, number):
            took[name].append(await first_token(ways[name]))
    return took


async def first_token(way: Way) -> float:
    """Run a job to its end; return the milliseconds until its first text."""
    begin, first = time.monotonic(), 0.0
    async for text in way(2):
        if text and not first:
            first = time.monotonic() - begin
    return first * 1000


if __name__ == "__main__":
    script.run(report_of, Sizes(), Sizes(rounds=1, jobs=2, streams=(1,), tokens=24), __doc__)
