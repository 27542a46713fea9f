"""What tracing costs: jobs a second, token latency and processor time, with spans exported, only created, and off.

Three stacks run at the same time and are measured in turns, so that other load of the machine affects all of them:

- suite_exported: the service sends every span by OTLP to a receiver that drops it, in the SDK's default batches;
- suite_not_exported: the default, in which spans are created and not exported;
- peer_off: OTEL_SDK_DISABLED=true.

`jobs_per_second` is measured from the first Submit to the end of the last stream, `latency_ms_p50` from the engine's
yield to the client, as in bench.token_latency. `cpu_ms_a_job` is that of gateway, worker and notifier together, the
export of spans included. It shows the cost of tracing on a machine whose other load makes the other figures random.

Not measured: the work of the collector, the network, vLLM's own tracing.

    python -m bench.tracing_cost
"""

import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc

from bench.support import script
from bench.support.report import Report, rotated
from bench.support.stacks import new_stack, simulated
from bench.support.usage import cpu_of
from bench.support.watched_job import together
from bench.token_latency import measure as token_ages
from bench.token_latency import suite
from deploy.local.stack import Stack
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 7
    jobs: int = 60
    at_once: int = 30
    streams: int = 8
    tokens: int = 90


EXPORTED: Final = "suite_exported"
NOT_EXPORTED: Final = "suite_not_exported"
OFF: Final = "peer_off"
TOKENS_OF_JOB: Final = 3
PER_SECOND: Final = 30
SERVICES: Final = ("gateway", "gpu-worker", "notifier")
_EXPORT: Final = ("opentelemetry.proto.collector.trace.v1.TraceService", "Export")


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report("What does tracing cost?", "Jobs a second; ms from the engine's yield to the client; processor ms.")
    async with AsyncExitStack() as running:
        endpoint = await running.enter_async_context(receiver())
        ways = {
            OFF: {"OTEL_SDK_DISABLED": "true"},
            NOT_EXPORTED: {},
            EXPORTED: {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
        }
        turns = {who: await running.enter_async_context(running_turn(way, sizes)) for who, way in ways.items()}
        for turn in turns.values():
            # The first jobs of a process fill its caches.
            await turn.run_jobs()
        for number in range(sizes.rounds):
            # The first of a round may find less other load, so the order rotates.
            for who in rotated(turns, number):
                report.add("jobs", who, await turns[who].jobs())
                report.add("tokens", who, await turns[who].tokens())
    for who in (EXPORTED, NOT_EXPORTED):
        report.ratio("jobs", "jobs_per_second", OFF, who=who, at_least=0.95)
        report.ratio("tokens", "latency_ms_p50", OFF, who=who, at_most=1.05)
        report.ratio("jobs", "cpu_ms_a_job", OFF, who=who)
    return report


@asynccontextmanager
async def receiver() -> AsyncIterator[str]:
    """Yield the address of an OTLP receiver that drops everything."""

    async def drop(request: bytes, context: Any) -> bytes:
        return b""

    server = grpc.aio.server()
    service, method = _EXPORT
    server.add_registered_method_handlers(service, {method: grpc.unary_unary_rpc_method_handler(drop)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"http://127.0.0.1:{port}"
    await server.stop(None)


@asynccontextmanager
async def running_turn(tracing: dict[str, str], sizes: Sizes) -> AsyncIterator["Turn"]:
    """Run a stack with these variables in every service, and yield its Turn."""
    worker = {"GPU_WORKER_MAX_CONCURRENT": str(sizes.at_once), **simulated(tokens_per_second=PER_SECOND)}
    with new_stack({"gateway": tracing, "notifier": tracing, "gpu-worker": {**tracing, **worker}}) as stack:
        stack.processes["gpu-worker"].command = (sys.executable, "-m", "bench.peers.stamping_worker")
        async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            yield Turn(stack, LlmServiceStub(channel), sizes)


class Turn:
    """A running stack, and its measurements."""

    def __init__(self, stack: Stack, stub: LlmServiceStub, sizes: Sizes) -> None:
        self._stack = stack
        self._read = suite(stub)
        self._sizes = sizes

    async def jobs(self) -> dict[str, float]:
        """Run jobs to their ends; return the figures."""
        begin, before = time.perf_counter(), self._cpu_seconds()
        await self.run_jobs()
        return {
            "jobs_per_second": self._sizes.jobs / (time.perf_counter() - begin),
            "cpu_ms_a_job": 1000 * (self._cpu_seconds() - before) / self._sizes.jobs,
        }

    async def tokens(self) -> dict[str, float]:
        """Watch tokens as they are generated; return the figures."""
        ages = await token_ages(self._read, self._sizes.streams, self._sizes.tokens)
        return {f"latency_ms_{name}": value for name, value in ages.items()}

    async def run_jobs(self) -> None:
        """Run jobs to their ends."""
        await together(self._sizes.jobs, lambda: self._read(TOKENS_OF_JOB), self._sizes.at_once)

    def _cpu_seconds(self) -> float:
        return sum(cpu_of(self._stack, SERVICES).values())


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, jobs=4, at_once=2, streams=1, tokens=25), __doc__)
