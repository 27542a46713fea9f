"""How old a token is when the client reads it: from the engine's yield to the StreamStatus message, in milliseconds.

The text of every token is the time at which the engine yielded it (see bench.peers.stamping_worker), and the client
subtracts it from its own time. Nothing of the suite is changed for that. Everything runs on this machine, over
loopback, with the suite's default settings except the size of the worker's batch. The client is one Python process that
reads all streams.

The peers and floors in the same run have the same pace and the same number of streams:

- Temporal's Workflow Streams, with one workflow and one subscriber for each stream, in two setups. One is that of its
  own sample for LLMs (batches of 200 ms, polls 100 ms apart). The other is its fastest (each token sent immediately, no
  pause between polls), and runs with one stream only, because 64 of these overload a server of this size, as 256 of the
  former do;
- `vllm serve`, where vLLM is installed, which streams server-sent events. Its engine is replaced by one that generates
  stamps at the same pace, so that only the way from the engine to the client is measured, as for the suite;
- the floors: the same stamps through a NATS server only, and through one gRPC stream only, both with the Python clients
  that the suite uses.

p50 and p99 are of tokens generated while all streams ran, from SETTLE_SECONDS after the last start to the first end.
`p99_of_all` is of all tokens, including those generated while other jobs start or end. A token that waits for others to
share a message counts with its whole wait.

Not measured: the first token of each job, whose latency is that of the job's start; the network; TLS.

    python -m bench.token_latency
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
import nats
from nats.aio.client import Client as Nats
from temporalio.client import Client

from bench.peers import vllm_peers
from bench.peers.stamp_sources import SERVICE, SUBJECT
from bench.peers.streaming_workflow import AS_IN_ITS_SAMPLE, FASTEST, Setup, end_stream, read_stream, start_stream
from bench.peers.vllm_peers import VllmServe
from bench.support import script
from bench.support.report import Report, quantiles
from bench.support.stacks import beside, new_stack, simulated
from bench.support.stamps import Read, read_stamps
from bench.support.watched_job import messages, submit
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 3
    streams: tuple[int, ...] = (1, 64, 256)
    tokens: int = 45
    tokens_more: int = 300


PER_SECOND: Final = 30
SETTLE_SECONDS: Final = 0.5
DEADLINE_SECONDS: Final = 180
PEER_FASTEST: Final = "peer_workflow_streams_fastest"
PEER_AS_SAMPLE: Final = "peer_workflow_streams_as_in_its_sample"
PEER_VLLM_SERVE: Final = "peer_vllm_serve"
AIM_P50_MS: Final = 5
AIM_TIMES_UNDER_STREAMS: Final = 10
AIM_TIMES_OF_VLLM_SERVE: Final = 2

Source = Callable[[int], Coroutine[Any, Any, list[Read]]]
"""Reads a stream with a number of tokens to its end."""


async def measure(source: Source, streams: int, tokens: int) -> dict[str, float]:
    """Read the streams concurrently; return the figures."""
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            read = await asyncio.gather(*(source(tokens) for _ in range(streams)))
    except TimeoutError as error:
        raise TimeoutError(f"{source}: {streams} streams did not end in time") from error
    begin = max(stamps[0].made for stamps in read) + SETTLE_SECONDS * 1e9
    end = min(stamps[-1].made for stamps in read)
    steady = [stamp.age for stamps in read for stamp in stamps if begin < stamp.made <= end]
    later = [stamp.age for stamps in read for stamp in stamps[1:]]
    return quantiles(steady) | {"p99_of_all": quantiles(later)["p99"]}


def suite(stub: LlmServiceStub) -> Source:
    """Return a source that submits a job and watches it."""

    async def read(tokens: int) -> list[Read]:
        id_ = await submit(stub, tokens=tokens)
        stamps: list[Read] = []
        async for message in messages(stub, id_):
            stamps += read_stamps(message.delta.text)
        return stamps

    return read


def workflow_streams(client: Client, setup: Setup) -> Source:
    """Return a source of the peer that starts a workflow and subscribes to it."""

    async def read(tokens: int) -> list[Read]:
        handle = await start_stream(client, tokens, PER_SECOND, setup)
        stamps = await read_stream(client, handle, tokens, setup)
        await end_stream(handle)
        return stamps

    return read


def vllm_serve(serve: VllmServe) -> Source:
    """Return a source of the peer that streams a completion."""

    async def read(tokens: int) -> list[Read]:
        stamps: list[Read] = []
        async for text in serve.texts("x", tokens):
            stamps += read_stamps(text)
        return stamps

    return read


def bare_grpc(channel: grpc.aio.Channel) -> Source:
    """Return a source that reads one gRPC stream."""
    call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{SERVICE}/Stream")

    async def read(tokens: int) -> list[Read]:
        stamps: list[Read] = []
        async for text in call(f"{tokens} {PER_SECOND}".encode()):
            stamps += read_stamps(text.decode())
        return stamps

    return read


def bare_nats(feed: Nats) -> Source:
    """Return a source that reads one NATS subject."""

    async def read(tokens: int) -> list[Read]:
        stamps: list[Read] = []
        subscription = await feed.subscribe(inbox := feed.new_inbox())
        await feed.publish(SUBJECT, f"{tokens} {PER_SECOND}".encode(), reply=inbox)
        async for message in subscription.messages:
            stamps += read_stamps(message.data.decode())
            if len(stamps) == tokens:
                break
        await subscription.unsubscribe()
        return stamps

    return read


@asynccontextmanager
async def all_sources(most_streams: int) -> AsyncIterator[dict[str, Source]]:
    """Run the stack and the processes of the peers, and yield the sources by name."""
    worker = simulated(tokens_per_second=PER_SECOND) | {"GPU_WORKER_MAX_CONCURRENT": str(most_streams)}
    async with AsyncExitStack() as opened:
        stack = opened.enter_context(new_stack({"gpu-worker": worker}))
        stack.processes["gpu-worker"].command = (sys.executable, "-m", "bench.peers.stamping_worker")
        await opened.enter_async_context(stack)
        temporal, broker = stack.address("temporal"), f"nats://{stack.address('nats')}"
        other = await opened.enter_async_context(beside("bench.peers.stamp_sources", temporal, broker))
        client, feed = await Client.connect(temporal), await nats.connect(broker)
        opened.push_async_callback(feed.close)
        gateway = await opened.enter_async_context(grpc.aio.insecure_channel(stack.address("gateway")))
        bare = await opened.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{other.ready}"))
        sources = {
            "suite": suite(LlmServiceStub(gateway)),
            PEER_FASTEST: workflow_streams(client, FASTEST),
            PEER_AS_SAMPLE: workflow_streams(client, AS_IN_ITS_SAMPLE),
        }
        if vllm_peers.installed():
            command = ("bench.peers.stamping_vllm_serve", str(PER_SECOND))
            serve = await opened.enter_async_context(
                VllmServe.running("models/docstrings", most_streams, command=command)
            )
            sources[PEER_VLLM_SERVE] = vllm_serve(serve)
        yield sources | {"floor_grpc_stream": bare_grpc(bare), "floor_nats": bare_nats(feed)}


def measured(name: str, streams: int) -> bool:
    """Return whether a source is measured with `streams` streams."""
    most = {PEER_FASTEST: 1, PEER_AS_SAMPLE: 64}
    return streams <= most.get(name, streams)


async def main(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "How fresh is a token?",
        f"ms from the engine's yield to the client's read, {PER_SECOND} tokens a second and stream.",
    )
    async with all_sources(max(sizes.streams)) as sources:
        for name, source in sources.items():
            if not name.startswith("floor"):
                # The first job of a process fills its caches.
                await measure(source, 1, 2 * PER_SECOND)
        for _ in range(sizes.rounds):
            for streams in sizes.streams:
                for name, source in sources.items():
                    if measured(name, streams):
                        # With many jobs it takes longer until all of them run.
                        tokens = sizes.tokens + (0 if name.startswith("floor") else sizes.tokens_more * streams // 64)
                        report.add(f"{streams} streams", name, await measure(source, streams, tokens))
    for streams in sizes.streams:
        case = f"{streams} streams"
        report.judge(f"p50 in ms, suite, {case}", report.rounds(case, "suite", "p50"), at_most=AIM_P50_MS)
        for peer in (PEER_AS_SAMPLE, PEER_FASTEST):
            report.ratio(case, "p50", peer, invert=True, at_least=AIM_TIMES_UNDER_STREAMS)
        report.ratio(case, "p50", PEER_VLLM_SERVE, at_most=AIM_TIMES_OF_VLLM_SERVE)
    return report


if __name__ == "__main__":
    script.run(main, Sizes(), Sizes(rounds=1, streams=(1,), tokens=24, tokens_more=0), __doc__)
