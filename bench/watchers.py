"""What a watcher costs one gateway: memory, processor time and latency, from 10 streams to 5,000.

All watch one job, which generates a token a second. The text of a token is the time at which the engine yielded it. A
token goes to all watchers at the same time. So the latency of the last one is the time to write to all, and the time in
which this script reads from all: it reads every stream in one process, 100 on each connection. The gateway restarts for
each round. Memory is what the gateway uses above its use with one watcher, as the number of watchers grows.

The floor in the same run is the same number of streams of a bare gRPC server in Python that sends its stamps to all of
them. Not measured: the cost of a connection, the network, TLS.

    python -m bench.watchers
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import grpc

from bench.peers.stamp_sources import SERVICE
from bench.support import script
from bench.support.report import Report, quantiles
from bench.support.stacks import beside, models, new_stack, simulated
from bench.support.stamps import read_stamps
from bench.support.usage import cpu_seconds, resident_bytes
from bench.support.watched_job import MODEL, messages, submit
from deploy.local.stack import Stack
from jobs.names import GPU_QUEUE
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 3
    watchers: tuple[int, ...] = (10, 100, 1000, 5000)
    seconds: float = 6
    settle_seconds: float = 3


PER_SECOND: Final = 1
STREAMS_OF_A_CONNECTION: Final = 100
AIM_KB: Final = 50

Texts = Callable[[grpc.aio.Channel], AsyncIterator[str]]
"""Opens one stream and yields its texts."""


class Readers:
    """Streams of one server, which are read continuously."""

    def __init__(self, address: str, texts: Texts) -> None:
        self._address = address
        self._texts = texts
        self._channels: list[grpc.aio.Channel] = []
        self._reading: list[asyncio.Task[None]] = []
        self._ages: list[float] = []
        self._reached = asyncio.Semaphore(0)

    async def grow(self, count: int) -> None:
        """Open streams until there are `count`, and wait until each has received a text."""
        new = count - len(self._reading)
        for _ in range(new):
            if len(self._reading) % STREAMS_OF_A_CONNECTION == 0:
                own = [("grpc.use_local_subchannel_pool", 1)]
                self._channels.append(grpc.aio.insecure_channel(self._address, options=own))
            self._reading.append(asyncio.create_task(self._read(self._channels[-1])))
        async with asyncio.timeout(60):
            for _ in range(new):
                await self._reached.acquire()

    async def ages(self, seconds: float) -> list[float]:
        """Return the ages, in ms, of all stamps that are read in the next `seconds`."""
        self._ages.clear()
        await asyncio.sleep(seconds)
        return list(self._ages)

    async def close(self) -> None:
        """End the streams. Raises the error of a stream that has already ended."""
        broken = next((task for task in self._reading if task.done()), None)
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        if broken is not None:
            broken.result()
            raise RuntimeError("a stream ended before the measurement")

    async def _read(self, channel: grpc.aio.Channel) -> None:
        begun = False
        async for text in self._texts(channel):
            self._ages += [stamp.age for stamp in read_stamps(text)]
            if not begun:
                begun = True
                self._reached.release()


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "How many watchers?",
        f"All watch one job of {PER_SECOND} token a second. Memory and processor time are the gateway's, per watcher."
        " Memory is counted above that of one watcher. Latency is from the engine's yield to the client's read.",
    )
    most = max(sizes.watchers)
    environment = {
        "gateway": models((MODEL, GPU_QUEUE), tokens=1_000_000)
        | {"GATEWAY_MAX_WATCHERS": str(most + 1), "GATEWAY_MAX_WATCHERS_PER_USER": str(most + 1)},
        "gpu-worker": simulated(tokens_per_second=PER_SECOND, context_tokens=1_000_000),
    }
    with new_stack(environment) as stack:
        stack.processes["gpu-worker"].command = (sys.executable, "-m", "bench.peers.stamping_worker")
        async with stack:
            temporal, broker = stack.address("temporal"), f"nats://{stack.address('nats')}"
            async with beside("bench.peers.stamp_sources", temporal, broker) as other:
                for number in range(sizes.rounds):
                    if number > 0:
                        await restart_gateway(stack)
                    await suite_round(report, sizes, stack)
                    await floor_round(report, sizes, f"127.0.0.1:{other.ready}")
    for watchers in sizes.watchers:
        kilobytes = report.rounds(name(watchers), "suite", "kilobytes")
        # With few watchers the gateway's own growth exceeds theirs.
        aim = {"at_most": float(AIM_KB)} if watchers >= 1000 else {}
        report.judge(f"KB a watcher, {name(watchers)}", kilobytes, **aim)
    for watchers in sizes.watchers:
        report.ratio(name(watchers), "p99", "floor_grpc_broadcast")
    return report


def name(watchers: int) -> str:
    """Return the name of a case."""
    return f"{watchers} watchers"


async def restart_gateway(stack: Stack) -> None:
    """Stop the gateway and start it again."""
    gateway = stack.processes["gateway"]
    await gateway.terminate()
    await gateway.start()
    await gateway.wait_ready()


@asynccontextmanager
async def reading(address: str, texts: Texts) -> AsyncIterator[Readers]:
    """Yield readers and close them."""
    readers = Readers(address, texts)
    try:
        yield readers
    finally:
        await readers.close()


async def suite_round(report: Report, sizes: Sizes, stack: Stack) -> None:
    """Measure the gateway with a growing number of watchers."""
    gateway, pid = stack.address("gateway"), stack.processes["gateway"].pid
    assert pid is not None
    async with grpc.aio.insecure_channel(gateway) as channel:
        stub = LlmServiceStub(channel)
        id_ = await submit(stub, tokens=100_000)

        async def texts(channel: grpc.aio.Channel) -> AsyncIterator[str]:
            async for message in messages(LlmServiceStub(channel), id_):
                if message.HasField("delta"):
                    yield message.delta.text

        async with reading(gateway, texts) as first:
            await first.grow(1)
            await asyncio.sleep(sizes.settle_seconds)
            before = resident_bytes(pid)
        async with reading(gateway, texts) as readers:
            for watchers in sizes.watchers:
                await readers.grow(watchers)
                await asyncio.sleep(sizes.settle_seconds)
                cpu = cpu_seconds(pid)
                ages = await readers.ages(sizes.seconds)
                used = cpu_seconds(pid) - cpu
                figures = {
                    "kilobytes": max(0, resident_bytes(pid) - before) / watchers / 1000,
                    "cpu_microseconds_a_second": used / sizes.seconds / watchers * 1e6,
                    **quantiles(ages),
                }
                report.add(name(watchers), "suite", figures)
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


async def floor_round(report: Report, sizes: Sizes, address: str) -> None:
    """Measure the same numbers of streams of a bare server."""

    async def texts(channel: grpc.aio.Channel) -> AsyncIterator[str]:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{SERVICE}/Broadcast")
        async for text in call(f"{PER_SECOND}".encode()):
            yield text.decode()

    async with reading(address, texts) as readers:
        for watchers in sizes.watchers:
            await readers.grow(watchers)
            await asyncio.sleep(sizes.settle_seconds)
            report.add(name(watchers), "floor_grpc_broadcast", quantiles(await readers.ages(sizes.seconds)))


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, watchers=(2, 4), seconds=2.2, settle_seconds=0.1), __doc__)
