"""Whether background jobs make way for a job that somebody waits for.

The worker's simulated engine has eight seats, so that a seat is what is short, and no core. Interactive jobs come one
after another: some to an idle worker (`limit_alone`), then some to one with a background job in each seat, and as many
in the queue (`suite`), and so on. There each of them takes the seat of one. `first_token` is the time
from the client's Submit to the first delta that it reads.

The peer in the same run, `peer_one_class`, has the same load in the class of the interactive jobs, as an installation
without classes has it. An interactive job waits in the queue until another job ends. So that the wait ends, these jobs
take a second.

How soon a seat is free, for `suite`:

- `pause`: from the start of the interactive job's attempt, by Temporal, to its first token, which the engine
  generates immediately. The attempt takes the seat of a background job meanwhile; with `limit_alone` it finds a free
  one.
- `cancel`: from the client's Cancel of the interactive job until the client reads that the paused job runs again. This
  includes the way through gateway, Temporal and the feed.

At the end of each round background jobs run with interactive ones to their ends. `equal` is the share of them whose
output is byte for byte that of the same job undisturbed; `pauses` is the number of their pauses.

    python -m bench.seats
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import grpc

from bench.support import script
from bench.support.report import Report, quantiles
from bench.support.stacks import models, new_stack, simulated
from bench.support.watched_job import MODEL, WatchedJob, finish, messages, submit
from jobs.names import GPU_QUEUE
from llm_pb import common_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line. `jobs` is the number of interactive jobs for each way and round, `tokens` the
    length of the background jobs whose outputs are compared."""

    rounds: int = 5
    jobs: int = 100
    tokens: int = 100


SEATS: Final = 8
TOKENS_PER_SECOND: Final = 20
"""Speed of each generation. It is low, so that the tokens of the load leave the cores free."""
ENDLESS: Final = 8000
"""Number of tokens of a job that is cancelled long before its end."""
AIM_RATIO: Final = 1.2
AIM_FREED_MS: Final = 250
BLOCKS: Final = 5
"""Number of times in a round that the load starts and ends, so that what else the machine does meets both ways."""
FIRST_TOKEN: Final = f"interactive jobs, {SEATS} seats"
PAUSE: Final = "a seat is free after a pause"
CANCEL: Final = "a seat is free after a cancel"
OUTPUT: Final = "output of background jobs"
INTERACTIVE, BACKGROUND = common_pb2.JOB_CLASS_STANDARD, common_pb2.JOB_CLASS_BACKGROUND


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "Does background work delay a job that somebody waits for?",
        "ms, from Submit to the first token at the client, and until a seat is free. One interactive job at a time,"
        " loopback, no TLS. Not measured: the time for which an engine reads the prompt of a paused job again.",
    )
    worker = simulated(tokens_per_second=TOKENS_PER_SECOND) | {"GPU_WORKER_MAX_CONCURRENT": str(SEATS)}
    environment = {
        "gpu-worker": worker | {"GPU_WORKER_PAUSE_WAIT": "PT5M"},
        "gateway": models((MODEL, GPU_QUEUE)) | {"GATEWAY_CLASSES": '{"BACKGROUND": {"rate": null}}'},
    }
    with new_stack(environment) as stack:
        async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            stub = LlmServiceStub(channel)
            # The first jobs of a process fill its caches.
            await alone(stub, min(sizes.jobs, 5))
            expected = [await output_of(stub, number, sizes.tokens) for number in range(SEATS)]
            for _ in range(sizes.rounds):
                idle: list[Interactive] = []
                beside: list[Interactive] = []
                for _ in range(BLOCKS):
                    idle += await alone(stub, max(sizes.jobs // BLOCKS, 2))
                    beside += await beside_background(stub, max(sizes.jobs // BLOCKS, 2))
                crowd = await in_one_class(stub, max(sizes.jobs // BLOCKS, 2))
                for who, ran in (("suite", beside), ("limit_alone", idle), ("peer_one_class", crowd)):
                    report.add(FIRST_TOKEN, who, quantiles([job.first_token_ms for job in ran]))
                for who, ran in (("suite", beside), ("limit_alone", idle)):
                    report.add(PAUSE, who, quantiles([job.start_ms for job in ran]))
                report.add(CANCEL, "suite", quantiles([job.freed_ms for job in beside]))
                equal, pauses = await compared(stub, expected, sizes.tokens)
                report.add(OUTPUT, "suite", {"equal": equal, "pauses": pauses})
    report.ratio(FIRST_TOKEN, "p99", "limit_alone", at_most=AIM_RATIO)
    report.ratio(FIRST_TOKEN, "p50", "limit_alone")
    report.ratio(FIRST_TOKEN, "p50", "peer_one_class")
    for case in (PAUSE, CANCEL):
        report.judge(f"p99 in ms, {case}", report.rounds(case, "suite", "p99"), at_most=AIM_FREED_MS)
    report.judge("share of background outputs that are equal", report.rounds(OUTPUT, "suite", "equal"), at_least=1)
    return report


class Interactive:
    """An endless interactive job that has its first token."""

    def __init__(self, stub: LlmServiceStub, workflow_id: str, first_token_ms: float) -> None:
        self.workflow_id = workflow_id
        self.first_token_ms = first_token_ms
        self.start_ms = 0.0
        """Time from the start of its attempt to its first token. Known once the job has ended."""
        self.freed_ms = 0.0
        """Time from its cancel until the job that it has made pause runs again."""
        self._stub = stub

    @classmethod
    async def start(cls, stub: LlmServiceStub) -> "Interactive":
        """Submit the job and wait for its first token."""
        begin = time.monotonic()
        id_ = await submit(stub, user_id="interactive", tokens=ENDLESS, job_class=INTERACTIVE)
        async for message in messages(stub, id_):
            if message.HasField("delta"):
                break
        return cls(stub, id_, (time.monotonic() - begin) * 1000)

    async def cancel(self) -> None:
        """Cancel the job, and wait for its end."""
        await self._stub.Cancel(llm_pb2.CancelRequest(workflow_id=self.workflow_id))
        async for message in messages(self._stub, self.workflow_id):
            last = message
        metadata = last.result.metadata
        self.start_ms = (metadata.first_token_time.ToNanoseconds() - metadata.start_time.ToNanoseconds()) / 1e6


async def alone(stub: LlmServiceStub, jobs: int) -> list[Interactive]:
    """Run interactive jobs one after another."""
    ran = []
    for _ in range(jobs):
        ran.append(await Interactive.start(stub))
        await ran[-1].cancel()
    return ran


async def beside_background(stub: LlmServiceStub, jobs: int) -> list[Interactive]:
    """Run interactive jobs one after another with a full background load."""
    ran = []
    async with background_load(stub) as load:
        for _ in range(jobs):
            job = await Interactive.start(stub)
            (paused,) = await paused_of(load)
            begin = time.monotonic()
            cancelling = asyncio.create_task(job.cancel())
            await paused.until(partial(paused.in_state, llm_pb2.JOB_STATE_RUNNING))
            job.freed_ms = (time.monotonic() - begin) * 1000
            await cancelling
            ran.append(job)
    return ran


@asynccontextmanager
async def background_load(stub: LlmServiceStub) -> AsyncIterator[list[WatchedJob]]:
    """Have the background jobs run while the context is open; yield those that have the seats."""
    load = [await background_job(stub) for _ in range(SEATS)]
    for job in load:
        await job.until(partial(has_output, job))
    queue = [await background_job(stub) for _ in range(SEATS)]
    yield load
    for job in (*queue, *load):
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=job.workflow_id))
        await job.end()


def has_output(job: WatchedJob) -> bool:
    """Return whether the watcher has any output of the job."""
    return job.output_bytes > 0


async def background_job(stub: LlmServiceStub, **fields: object) -> WatchedJob:
    """Submit an endless background job and watch it."""
    params = llm_pb2.SamplingParams(max_tokens=ENDLESS)
    return await WatchedJob.submit(stub, job_class=BACKGROUND, **{"params": params, **fields})


async def paused_of(load: list[WatchedJob]) -> list[WatchedJob]:
    """Return the paused jobs, once there are any."""
    waits = [asyncio.create_task(job.until(partial(job.in_state, llm_pb2.JOB_STATE_QUEUED))) for job in load]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    return [job for job in load if job.in_state(llm_pb2.JOB_STATE_QUEUED)]


async def in_one_class(stub: LlmServiceStub, jobs: int) -> list[Interactive]:
    """Run interactive jobs one after another with a load of the same class."""
    over = asyncio.Event()

    async def client() -> None:
        while not over.is_set():
            await finish(stub, await submit(stub, user_id="load", tokens=TOKENS_PER_SECOND, job_class=INTERACTIVE))

    load = [asyncio.create_task(client()) for _ in range(2 * SEATS)]
    ran = await alone(stub, jobs)
    over.set()
    await asyncio.gather(*load)
    return ran


async def output_of(stub: LlmServiceStub, number: int, tokens: int) -> str:
    """Return the output of the job of this number, undisturbed."""
    return (await finish(stub, await submit(stub, prompt=f"{number}", tokens=tokens))).result.output


async def compared(stub: LlmServiceStub, expected: list[str], tokens: int) -> tuple[float, float]:
    """Run the jobs in the background with interactive ones; return the share that is equal, and their pauses."""
    ids = [
        await submit(stub, prompt=f"{number}", tokens=tokens, job_class=BACKGROUND) for number in range(len(expected))
    ]
    running = asyncio.gather(*(finish(stub, id_) for id_ in ids))
    while not running.done():
        await alone(stub, 1)
    results = [message.result for message in await running]
    equal = sum(result.output == text for result, text in zip(results, expected, strict=True))
    return equal / len(expected), float(sum(result.metadata.pauses for result in results))


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, jobs=2, tokens=50), __doc__)
