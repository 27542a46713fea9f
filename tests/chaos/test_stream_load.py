"""Any number of a job's watchers cost one subscription, no call to Temporal and no event in its history."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import grpc
import nats
import pytest
from temporalio.client import Client

from bench.support.temporal_counts import TemporalCounts
from deploy.local.stack import Stack
from feed.feed import FeedSettings
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import Seen, details_of, new_job, watch
from tests.support.paths import ROOT
from tests.support.stacks import FAST, stack_settings
from tests.support.watchers import when_output_reaches

WATCHERS = 200
SLOW_READERS = 20
MANY_TOKENS = 100_000
STOPPED_SECONDS = 30
TOKENS_PER_SECOND = 30
READS = ("DescribeWorkflowExecution", "GetWorkflowExecutionHistory", "QueryWorkflow", "ListWorkflowExecutions")
"""Calls with which a gateway reads jobs from Temporal."""


class Loaded(NamedTuple):
    """A stack with a second model, "fast", whose worker generates tokens without a pause."""

    stack: Stack
    stub: LlmServiceStub
    temporal: Client

    async def submit(self, **changes: object) -> llm_pb2.SubmitResponse:
        return await self.stub.Submit(llm_pb2.SubmitRequest(job=new_job(**changes)))

    async def reads(self) -> int:
        """Return the number of calls so far that read jobs from Temporal, as Temporal counts them."""
        calls, *_ = await TemporalCounts(self.stack).settled(self.temporal)
        return sum(calls[operation] for operation in READS)

    async def subscriptions(self) -> int:
        """Return the number of consumers of the broker's stream."""
        client = await nats.connect(f"nats://{self.stack.address('nats')}")
        info = await client.jetstream().stream_info(FeedSettings().stream)
        await client.close()
        return info.state.consumer_count

    async def events(self, workflow_id: str) -> int:
        """Return the number of events in a job's history."""
        return len((await self.temporal.get_workflow_handle(workflow_id).fetch_history()).events)

    def memory(self) -> int:
        """Return the resident memory of the gateway in bytes."""
        status = Path(f"/proc/{self.stack.processes['gateway'].pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@pytest.fixture(scope="module")
async def loaded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Loaded]:
    models = """[
        {"name": "docstrings", "context_tokens": 8192, "max_output_tokens": 8192, "default_max_tokens": 64},
        {"name": "fast", "context_tokens": 200000, "max_output_tokens": 200000, "default_max_tokens": 64,
         "queue": "llm-gpu-activities.fast"}
    ]"""
    environment = {
        "gateway": {**FAST["gateway"], "GATEWAY_MODELS": models, "GATEWAY_HEARTBEAT_TIMEOUT": "PT30S"}
        # The default. On a busy machine a feed may be silent for longer than the shorter interval of other tests.
        | {"GATEWAY_POLL": "PT1S"},
        "gpu-worker": FAST["gpu-worker"]
        | {"GPU_WORKER_ENGINE_OPTIONS": json.dumps({"tokens_per_second": TOKENS_PER_SECOND})},
    }
    only = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    stack = Stack(stack_settings(tmp_path_factory.mktemp("load")), only=only, environment=environment)
    async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        fast = stack.add(
            "gpu-worker",
            {
                "GPU_WORKER_MODEL": "fast",
                "GPU_WORKER_TASK_QUEUE": "llm-gpu-activities.fast",
                "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 1e9, "context_tokens": 200000}',
            },
        )
        await fast.start()
        await fast.wait_ready()
        temporal = await Client.connect(stack.address("temporal"))
        yield Loaded(stack, LlmServiceStub(channel), temporal)


async def undisturbed_reads(loaded: Loaded) -> int:
    """Return the number of calls that read jobs from Temporal in a time of several polls, with one subscription."""
    reads, since = await loaded.reads(), time.monotonic()
    assert await loaded.subscriptions() == 1
    more = await loaded.reads() - reads
    assert time.monotonic() - since > 2, "the measurement was too short for several polls"
    return more


async def test_many_watchers_cost_one_subscription_and_no_call(loaded: Loaded) -> None:
    """This holds while a job runs and its feed is healthy. Every watcher gets the same bytes."""
    submitted = await loaded.submit(params={"max_tokens": 100 * TOKENS_PER_SECOND})
    watching = [asyncio.create_task(watch(loaded.stub, submitted.workflow_id)) for _ in range(WATCHERS)]
    await when_output_reaches(loaded.stub, submitted.workflow_id, 10)
    async with asyncio.timeout(60):
        # A subscription that the machine has kept waiting is replaced, and the broker still counts it for a moment.
        while await loaded.subscriptions() != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    reads = [await undisturbed_reads(loaded)]
    while reads[-1] and len(reads) < 4:
        # On a busy machine the feed may be late, and the gateway asks. Watchers that ask would do so always.
        reads.append(await undisturbed_reads(loaded))
    assert reads[-1] == 0, reads
    assert not any(task.done() for task in watching), "the job ended during the measurement"
    await loaded.stub.Cancel(llm_pb2.CancelRequest(workflow_id=submitted.workflow_id))
    watchers = await asyncio.gather(*watching)
    (output,) = {seen.output for seen in watchers}
    assert output == watchers[0].final.result.output.encode()
    assert not any(seen.rewinds for seen in watchers)


async def test_history_does_not_grow_with_tokens_or_watchers(loaded: Loaded) -> None:
    """docs/streams.md states the number of events."""
    counted = {}
    for tokens, watchers in ((10, 0), (10_000, WATCHERS)):
        submitted = await loaded.submit(model="fast", params={"max_tokens": tokens})
        await asyncio.gather(*(watch(loaded.stub, submitted.workflow_id) for _ in range(watchers)))
        seen = await watch(loaded.stub, submitted.workflow_id)
        assert seen.final.result.metadata.output_tokens == tokens
        counted[tokens, watchers] = await loaded.events(submitted.workflow_id)
    (events,) = set(counted.values())
    assert f"{events} history events" in (ROOT / "docs" / "streams.md").read_text()


@pytest.mark.long
async def test_a_reader_that_stops_reading_costs_little_and_holds_nobody_up(loaded: Loaded) -> None:
    """20 readers stop for 30 s, during 100,000 tokens. They cost at most 1 MiB each, and then get every byte."""
    # They warm the gateway up.
    first = await loaded.submit(model="fast", params={"max_tokens": 10_000})
    await asyncio.gather(*(watch(loaded.stub, first.workflow_id) for _ in range(WATCHERS)))
    before = loaded.memory()
    id_ = (await loaded.submit(model="fast", params={"max_tokens": MANY_TOKENS})).workflow_id
    async with AsyncExitStack() as channels:
        slow = [await channels.enter_async_context(StoppedReader(loaded.stack, id_)) for _ in range(SLOW_READERS)]
        stopped = time.monotonic()
        beside, seconds = await timed(loaded, id_)
        made = beside.final.result.metadata
        grown = loaded.memory() - before
        await asyncio.sleep(stopped + STOPPED_SECONDS - time.monotonic())
        grown = max(grown, loaded.memory() - before)
        assert grown < SLOW_READERS * 1024 * 1024
        assert seconds < 3 * (made.latency.ToTimedelta() - made.time_to_first_token.ToTimedelta()).total_seconds() + 10
        # The stream's result may come without the output while stopped readers use up the streams' budget of bytes.
        look = llm_pb2.GetStatusRequest(workflow_id=id_)
        assert beside.output == (await loaded.stub.GetStatus(look)).result.output.encode()
        # All read at once: a reader that waited for its turn might stop for longer than GATEWAY_STALL_TIMEOUT allows.
        for seen in await asyncio.gather(*(reader.rest() for reader in slow)):
            assert seen.output == beside.output


async def timed(loaded: Loaded, id_: str) -> tuple[Seen, float]:
    """Watch a job, and return what was seen with the seconds from the first output to the end.

    The call has no deadline: how long a busy machine takes for this many tokens is not promised.
    """
    seen, since = Seen(), 0.0
    async for message in loaded.stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_)):
        seen.add(message)
        since = since or (time.monotonic() if message.HasField("delta") else 0.0)
    assert seen.states[-1] == "SUCCEEDED"
    return seen, time.monotonic() - since


class StoppedReader:
    """A client with its own connection that reads one message, and no more until rest() is called."""

    def __init__(self, stack: Stack, id_: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            stack.address("gateway"), options=[("grpc.use_local_subchannel_pool", 1)]
        )
        request = llm_pb2.StreamStatusRequest(workflow_id=id_)
        self._messages = aiter(LlmServiceStub(self._channel).StreamStatus(request))
        self._seen = Seen()

    async def __aenter__(self) -> "StoppedReader":
        self._seen.add(await anext(self._messages))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def rest(self) -> Seen:
        async for message in self._messages:
            self._seen.add(message)
        return self._seen


async def test_watchers_are_limited_for_the_gateway_and_for_each_user(loaded: Loaded) -> None:
    """A watcher over either limit gets RESOURCE_EXHAUSTED with RetryInfo. One that leaves makes room."""
    small = loaded.stack.add("gateway", {"GATEWAY_MAX_WATCHERS": "3", "GATEWAY_MAX_WATCHERS_PER_USER": "2"})
    await small.start()
    await small.wait_ready()
    async with grpc.aio.insecure_channel(loaded.stack.address(small.name)) as channel:
        stub = LlmServiceStub(channel)
        one, other = [
            (await loaded.submit(params={"max_tokens": 4000})).workflow_id,
            (await loaded.submit(params={"max_tokens": 4000})).workflow_id,
        ]
        calls = [await opened(stub, one), await opened(stub, one)]
        assert "user" in await refusal(stub, one)
        calls.append(await opened(stub, other))
        assert "gateway" in await refusal(stub, other)
        for call in calls:
            call.cancel()
        async with asyncio.timeout(60):
            while await is_refused(stub, one):
                pass
        for id_ in (one, other):
            await loaded.stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await small.terminate()


async def opened(stub: LlmServiceStub, id_: str) -> grpc.aio.UnaryStreamCall:
    """Open a stream, and return it once its first message has come."""
    call = stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=60)
    assert (await call.read()).HasField("status")
    return call


async def is_refused(stub: LlmServiceStub, id_: str) -> bool:
    """Return True if a stream is refused because of a limit."""
    try:
        await opened(stub, id_)
    except grpc.aio.AioRpcError as error:
        return error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return False


async def refusal(stub: LlmServiceStub, id_: str) -> str:
    """Return the error message with which a stream is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await opened(stub, id_)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    details = details_of(error.value)
    assert details["ErrorInfo"].reason == "LIMIT_REACHED"
    assert details["RetryInfo"].retry_delay.seconds > 0
    return error.value.details() or ""
