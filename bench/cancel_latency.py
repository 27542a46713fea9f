"""How soon a cancel takes effect, in each phase of a job, in milliseconds from the client's Cancel call.

`answered` is the answer to Cancel. `stream_ended` is the end of a StreamStatus of the same job on the same gateway,
whose last message has the state CANCELLED. `slot_free` is the start of the next job, which waited for the worker's only
slot. It is taken from that job's start_time, so it includes the hand-over through Temporal. The phases:

- queued: no worker asks for jobs of this model;
- prefill, decode: the simulated engine runs the job, before and after the first token;
- between_attempts: the engine has failed, and the next attempt is due in a minute;
- notifying: the receiver of the webhook has the event and does not answer. The outcome is settled, so a cancel changes
  nothing, and `stream_ended` counts from the receiver's answer instead;
- finished: a cancel changes nothing.

Jobs are cancelled one after another, in a stack that does little else. p50 and p99 are those of a round.

The peer in the same run is a workflow with one activity on the same server, cancelled by Temporal's own client. Its
times are when the call was `answered`, when the activity was cancelled (`activity_told`), and when the workflow was
`closed`. The floor is a gRPC health check of the gateway.

The server pushes cancels to workers (system.enableCancelActivityWorkerCommand, as deploy/local sets it). Where it does
not, suite and peer wait for the worker's next heartbeat: up to a second more. Not measured: concurrent cancels, the
network, TLS.

    python -m bench.cancel_latency
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from temporalio.api.enums.v1 import PendingActivityState
from temporalio.client import Client, WorkflowHandle

from bench.peers.cancel_peer import QUEUE, WaitingWorkflow
from bench.support import script
from bench.support.cancel_phases import Phases, Receiver, Sample
from bench.support.report import Report, quantiles
from bench.support.stacks import beside, models, new_stack, simulated
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line. `jobs` is the number per round and phase."""

    rounds: int = 3
    jobs: int = 50


AIM_P99_MS: Final = 250
_PEER: Final = "peer_bare_temporal"
_MODELS: Final[dict[str, dict[str, float] | None]] = {
    "queued": None,
    "prefill": {"prefill_seconds": 600},
    "decode": {"tokens_per_second": 30},
}
"""A model for each kind of worker, with the options of its engine. None means no worker."""

Phase = Callable[[], Awaitable[list[Sample]]]
"""Cancels the jobs of a round in one phase."""


def bare_temporal(client: Client, jobs: int) -> Phase:
    """Return the only phase of the peer, in which its activity runs."""
    number = 0

    async def cancel_all() -> list[Sample]:
        nonlocal number
        samples = []
        for _ in range(jobs):
            number += 1
            handle = await client.start_workflow(WaitingWorkflow.run, id=f"bench-cancel-{number}", task_queue=QUEUE)
            await until_started(handle)
            waiting = asyncio.create_task(handle.result())
            begin = time.time()
            await handle.cancel()
            answered = time.time()
            told = await waiting
            closed = time.time()
            samples.append(
                {
                    "answered": (answered - begin) * 1000,
                    "activity_told": (told / 1e9 - begin) * 1000,
                    "closed": (closed - begin) * 1000,
                }
            )
        return samples

    return cancel_all


async def until_started(handle: WorkflowHandle[Any, Any]) -> None:
    """Wait until a worker runs the workflow's activity."""
    while True:
        activities = (await handle.describe()).raw_description.pending_activities
        if any(each.state == PendingActivityState.PENDING_ACTIVITY_STATE_STARTED for each in activities):
            return
        await asyncio.sleep(0.01)


def health_check(channel: grpc.aio.Channel, jobs: int) -> Phase:
    """Return the floor, an answer of the gateway without any work."""
    stub = health_pb2_grpc.HealthStub(channel)

    async def call_all() -> list[Sample]:
        samples = []
        for _ in range(jobs):
            begin = time.perf_counter()
            await stub.Check(health_pb2.HealthCheckRequest())
            samples.append({"answered": (time.perf_counter() - begin) * 1000})
        return samples

    return call_all


@asynccontextmanager
async def all_phases(jobs: int) -> AsyncIterator[dict[str, Phase]]:
    """Run the stack and the worker of the peer, and yield the phases by name."""
    receiver = Receiver()
    gateway = models(*((name, f"bench-{name}") for name in _MODELS)) | {"GATEWAY_RETRY_INTERVAL": "PT60S"}
    async with AsyncExitStack() as opened:
        stack = opened.enter_context(new_stack({"gateway": gateway}))
        del stack.processes["gpu-worker"]
        for name, options in _MODELS.items():
            if options is not None:
                of_model = {"GPU_WORKER_MODEL": name, "GPU_WORKER_TASK_QUEUE": f"bench-{name}"}
                stack.add("gpu-worker", simulated(**options) | of_model | {"GPU_WORKER_MAX_CONCURRENT": "1"})
        await opened.enter_async_context(stack)
        await opened.enter_async_context(beside("bench.peers.cancel_peer", stack.address("temporal")))
        opened.push_async_callback((await receiver.start()).cleanup)
        client = await Client.connect(stack.address("temporal"))
        channel = await opened.enter_async_context(grpc.aio.insecure_channel(stack.address("gateway")))
        phases = Phases(LlmServiceStub(channel), receiver, jobs)
        yield {
            "queued": phases.queued,
            "prefill": phases.prefill,
            "decode": phases.decode,
            "between_attempts": phases.between_attempts,
            "notifying": phases.notifying,
            "finished": phases.finished,
            _PEER: bare_temporal(client, jobs),
            "floor_health_check": health_check(channel, jobs),
        }


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report("How soon does a cancel take effect?", "ms from the call of Cancel, by phase of the job.")
    async with all_phases(sizes.jobs) as phases:
        # The first job of a process fills its caches.
        await phases["finished"]()
        for _ in range(sizes.rounds):
            for name, phase in phases.items():
                samples = await phase()
                for what in samples[0]:
                    report.add(what, name, quantiles([sample[what] for sample in samples]))
    for name in phases:
        for what in ("answered", "stream_ended", "slot_free"):
            if not name.startswith(("peer", "floor")) and report.has(what, name):
                report.judge(f"p99 in ms, {what}, {name}", report.rounds(what, name, "p99"), at_most=AIM_P99_MS)
    report.ratio("answered", "p50", _PEER, who="decode")
    pairs = zip(report.rounds("stream_ended", "decode", "p50"), report.rounds("closed", _PEER, "p50"), strict=True)
    report.judge(f"p50, decode's stream_ended / {_PEER}'s closed", [ours / theirs for ours, theirs in pairs])
    return report


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, jobs=2), __doc__)
