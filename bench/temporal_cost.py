"""What a job costs Temporal: history events, bytes of history, calls of its API and writes, each per job.

Jobs run one after another. Each case has a number of tokens and of watchers. Temporal itself counts calls and writes,
the polls of workers included. `suite` notifies nobody, `suite_notified` one webhook.

The peers run the same job in the same run, on the same server. The first is Temporal's Workflow Streams, set up like
its own sample for LLMs: a batch of tokens each 200 ms, polls 100 ms apart, a subscriber for each watcher. Its tokens
come at the pace of the suite's engine. The second is a bare workflow with two remote activities and no tokens.

    python -m bench.temporal_cost
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final

import grpc
from temporalio.client import Client

from bench.peers.bare_workflow import QUEUE, BareWorkflow
from bench.peers.streaming_workflow import AS_IN_ITS_SAMPLE, read_stream, start_stream
from bench.support import script
from bench.support.report import Report
from bench.support.stacks import beside, models, new_stack, simulated
from bench.support.temporal_counts import TemporalCounts
from bench.support.watched_job import DEADLINE_SECONDS, MODEL, finish, submit
from deploy.local.ports import free_port
from deploy.local.receiver import Receiver
from jobs.names import GPU_QUEUE
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 3
    jobs: int = 3
    tokens: tuple[int, ...] = (10, 1000, 10_000)
    watchers: tuple[int, ...] = (0, 1, 10)


Way = Callable[[int, int], Awaitable[str]]
"""Runs a job with a number of tokens and of watchers; returns its workflow id."""
CONTEXT: Final = 200_000
PER_SECOND: Final = 1000
_ids = count(1)


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "What does a job cost Temporal?",
        "Per job: events and bytes of its history, calls of Temporal's API (polls included), writes of workflows to the"
        f" database and to the visibility store. The engine generates {PER_SECOND} tokens a second.",
    )
    # First the numbers of tokens with one watcher, then the numbers of watchers with a few tokens.
    cases = dict.fromkeys([*((tokens, 1) for tokens in sizes.tokens), *((sizes.tokens[0], n) for n in sizes.watchers)])
    async with running() as (ways, counts, client):
        for _ in range(sizes.rounds):
            for tokens, watchers in cases:
                for who, way in ways.items():
                    once = who in ("peer_bare_workflow", "suite_notified")
                    if once and (tokens, watchers) != (sizes.tokens[0], sizes.watchers[0]):
                        continue
                    calls = await per_job(way, counts, client, sizes.jobs, tokens, watchers)
                    report.add(name(tokens, watchers), who, calls)
    few, many = name(sizes.tokens[0], 1), name(sizes.tokens[-1], 1)
    for figure in ("events", "calls"):
        report.ratio(many, figure, "peer_workflow_streams", at_most=1)
    for what, less, more in (
        ("tokens", few, many),
        ("watchers", name(sizes.tokens[0], 1), name(sizes.tokens[0], sizes.watchers[-1])),
    ):
        for figure in ("events", "calls"):
            pairs = zip(report.rounds(more, "suite", figure), report.rounds(less, "suite", figure), strict=True)
            # A job that takes seconds heartbeats once a second, however many tokens it generates.
            aim = {"at_most": 1.0} if figure == "events" else {}
            report.judge(f"{figure}, many / few {what}", [a / b for a, b in pairs], **aim)
    report.ratio(name(sizes.tokens[0], sizes.watchers[0]), "events", "peer_bare_workflow")
    report.ratio(name(sizes.tokens[0], sizes.watchers[0]), "writes", "peer_bare_workflow")
    return report


def name(tokens: int, watchers: int) -> str:
    """Return the name of a case."""
    return f"{tokens} tokens, {watchers} watchers"


@asynccontextmanager
async def running() -> AsyncIterator[tuple[dict[str, Way], TemporalCounts, Client]]:
    """Run the stack and the peers; yield the ways by name, Temporal's counts and a client of Temporal."""
    environment = {
        # A gateway's periodic count of open jobs is no cost of a job.
        "gateway": {**models((MODEL, GPU_QUEUE), tokens=CONTEXT), "GATEWAY_OPEN_JOBS_INTERVAL": "PT0S"},
        "gpu-worker": simulated(tokens_per_second=PER_SECOND, context_tokens=CONTEXT),
    }
    async with AsyncExitStack() as opened:
        stack = opened.enter_context(new_stack(environment))
        await opened.enter_async_context(stack)
        temporal = stack.address("temporal")
        await opened.enter_async_context(beside("bench.peers.bare_workflow", temporal))
        await opened.enter_async_context(
            beside("bench.peers.stamp_sources", temporal, f"nats://{stack.address('nats')}")
        )
        channel = await opened.enter_async_context(grpc.aio.insecure_channel(stack.address("gateway")))
        stub, client = LlmServiceStub(channel), await Client.connect(temporal)

        receiver = await opened.enter_async_context(Receiver(free_port()))
        webhook = llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=receiver.url))

        async def suite(tokens: int, watchers: int, **fields: Any) -> str:
            id_ = await submit(stub, tokens=tokens, **fields)
            await asyncio.gather(*(finish(stub, id_) for _ in range(watchers)))
            await client.get_workflow_handle(id_).result()
            return id_

        async def streams(tokens: int, watchers: int) -> str:
            handle = await start_stream(client, tokens, PER_SECOND, AS_IN_ITS_SAMPLE)
            reading = [read_stream(client, handle, tokens, AS_IN_ITS_SAMPLE) for _ in range(watchers)]
            await asyncio.gather(*reading)
            await handle.result()
            return handle.id

        async def bare(tokens: int, watchers: int) -> str:
            id_ = f"bare-{next(_ids)}"
            await client.execute_workflow(BareWorkflow.run, 2, id=id_, task_queue=QUEUE)
            return id_

        ways: dict[str, Way] = {
            "suite": suite,
            "suite_notified": partial(suite, notify=[webhook]),
            "peer_workflow_streams": streams,
            "peer_bare_workflow": bare,
        }
        for way in ways.values():
            await way(1, 1)
        yield ways, TemporalCounts(stack), client


async def per_job(
    way: Way, counts: TemporalCounts, client: Client, jobs: int, tokens: int, watchers: int
) -> dict[str, float]:
    """Run `jobs` jobs; return the costs of one."""
    before = await counts.settled(client)
    async with asyncio.timeout(DEADLINE_SECONDS):
        ids = [await way(tokens, watchers) for _ in range(jobs)]
    after = await counts.settled(client)
    described = [(await client.get_workflow_handle(id_).describe()).raw_description for id_ in ids]
    # The long poll for the result is a call of this script.
    own = Counter({"PollWorkflowExecutionHistory": jobs})
    return {
        "events": sum(each.workflow_execution_info.history_length for each in described) / jobs,
        "history_bytes": sum(each.workflow_execution_info.history_size_bytes for each in described) / jobs,
        "calls": (after.calls - before.calls - own).total() / jobs,
        "writes": (after.writes - before.writes) / jobs,
        "visibility_writes": (after.visibility_writes - before.visibility_writes) / jobs,
    }


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, jobs=1, tokens=(5,), watchers=(1,)), __doc__)
