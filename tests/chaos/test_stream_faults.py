"""Every watcher finally holds the job's output, byte for byte, whichever process dies meanwhile.

Each test breaks something while a job has three watchers: one from the start, one that comes late, and one that
reconnects again and again.
"""

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc
import nats
import pytest
from google.protobuf.duration_pb2 import Duration
from pydantic import SecretStr

from deploy.local.process import Process
from deploy.local.stack import Stack
from feed.feed import FeedSettings
from feed.nats import NatsFeed
from jobs.stages import QUEUED
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import Seen, new_job, run_job, until_message, watch
from tests.support.stacks import FAST, SOON_LOST, stack_settings
from tests.support.watchers import watch_anywhere, watch_in_pieces, when_output_reaches

TOKENS = 400
LONG = 4 * TOKENS
"""Number of tokens of a job that is not half done when a broker has come back on a busy machine."""


def params(tokens: int) -> dict[str, Any]:
    """Return the sampling parameters of an output of so many tokens."""
    return {"temperature": 0.0, "max_tokens": tokens, "min_tokens": tokens}


PARAMS = params(TOKENS)
CACHE = llm_pb2.AnswerCache(ttl=Duration(seconds=600))


class Breakable(NamedTuple):
    """A stack that each test breaks, and restores at its end."""

    stack: Stack
    stub: LlmServiceStub
    expected: bytes
    """Output of an uninterrupted run of the job that submit() starts."""
    tokens: int = TOKENS
    """Number of its tokens."""

    @property
    def nats(self) -> Process:
        return self.stack.processes["nats"]

    def worker_of(self, status: llm_pb2.JobStatus) -> Process:
        """Return the process of the worker that the status names."""
        pid = int(status.progress.worker.rpartition("-")[2])
        (process,) = [process for process in self.stack.processes.values() if process.pid == pid]
        return process

    async def submit(self, **changes: Any) -> str:
        """Start the job again and return its id."""
        job = new_job(params=params(self.tokens), **changes)
        return (await self.stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id

    async def longer(self) -> "Breakable":
        """Return the same stack with a job that takes longer."""
        seen = await run_job(self.stub, new_job(params=params(LONG)))
        return self._replace(expected=seen.output, tokens=LONG)

    def check(self, watchers: list[Seen], attempts: int = 1) -> None:
        """Check that every watcher holds the whole output without a rewind, and that the result has the same output."""
        for seen in watchers:
            assert seen.states[-1] == "SUCCEEDED"
            assert seen.output == self.expected
            assert seen.rewinds == 0
            assert seen.final.result.output.encode() == self.expected
            assert seen.final.result.metadata.output_tokens == self.tokens
            assert seen.final.status.attempt >= attempts

    async def whole_again(self) -> None:
        """Return once a job streams, which shows that gateway and worker are connected to the feed again."""
        async with asyncio.timeout(100):
            while deltas_of(await run_job(self.stub, new_job(params={"max_tokens": 50}))) < 10:
                pass


@pytest.fixture(scope="module")
async def broken(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Breakable]:
    gateway = {**FAST["gateway"], **SOON_LOST}
    settings = stack_settings(tmp_path_factory.mktemp("faults"), gpu_workers=2)
    # With one slot a busy worker does not poll. A suspended worker that polls would hold a job until a timeout.
    worker = {**FAST["gpu-worker"], "GPU_WORKER_MAX_CONCURRENT": "1"}
    only = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    async with (
        Stack(settings, only=only, environment={**FAST, "gateway": gateway, "gpu-worker": worker}) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        stub = LlmServiceStub(channel)
        yield Breakable(stack, stub, (await run_job(stub, new_job(params=PARAMS))).output)


def deltas_of(seen: Seen) -> int:
    """Return the number of deltas in which the output came."""
    return sum(message.HasField("delta") for message in seen.messages)


async def test_a_killed_gateways_watchers_go_on_at_another(broken: Breakable) -> None:
    """After SIGKILL they continue at the next_offset that they had, without a rewind."""
    dying = broken.stack.add("gateway")
    await dying.start()
    await dying.wait_ready()
    async with grpc.aio.insecure_channel(broken.stack.address(dying.name)) as channel:
        id_ = await broken.submit()
        stub = LlmServiceStub(channel)
        watching = [asyncio.create_task(watch_anywhere([stub, broken.stub], id_)) for _ in range(2)]
        watching.append(asyncio.create_task(watch_in_pieces(stub, id_, random.Random(0), then=broken.stub)))
        await when_output_reaches(stub, id_, len(broken.expected) // 3)
        await dying.kill()
        late = asyncio.create_task(watch(broken.stub, id_))
        watchers = [*await asyncio.gather(*watching), await late]
    broken.check(watchers)


async def test_the_feeds_broker_dies_and_comes_back(broken: Breakable) -> None:
    """When NATS restarts on its store after SIGKILL, output continues live without a wrong byte or a rewind."""
    broken = await broken.longer()
    id_ = await broken.submit()
    early = asyncio.create_task(watch(broken.stub, id_))
    pieces = asyncio.create_task(watch_in_pieces(broken.stub, id_, random.Random(0)))
    await when_output_reaches(broken.stub, id_, len(broken.expected) // 4)
    await broken.nats.kill()
    late = asyncio.create_task(watch(broken.stub, id_))
    await broken.nats.start()
    watchers = [await early, await pieces, await late]
    broken.check(watchers)
    # Without the feed the rest of the output would come in one delta.
    offsets = [message.delta.offset for message in watchers[0].messages if message.HasField("delta")]
    assert sum(offset > len(broken.expected) // 2 for offset in offsets) > 1
    await broken.whole_again()


async def test_the_feeds_broker_is_gone_for_good(broken: Breakable) -> None:
    """Progress continues, and the output comes at the end from Temporal. A broker that returns is used again."""
    id_ = await broken.submit(cache=CACHE)
    early = asyncio.create_task(watch(broken.stub, id_))
    pieces = asyncio.create_task(watch_in_pieces(broken.stub, id_, random.Random(0)))
    await when_output_reaches(broken.stub, id_, len(broken.expected) // 4)
    await broken.nats.kill()
    late = asyncio.create_task(watch(broken.stub, id_))
    # The cache of answers is away, too.
    equal = asyncio.create_task(watch(broken.stub, await broken.submit(cache=CACHE)))
    watchers = [await early, await pieces, await late]
    broken.check([*watchers, await equal])
    for seen in watchers:
        # About 300 of the tokens came without the broker, in 1.5 s with a heartbeat every 0.3 s.
        reports = [m.status.progress.output_tokens for m in seen.messages if m.HasField("status")]
        assert len({tokens for tokens in reports if TOKENS // 3 < tokens < TOKENS}) >= 2
    await broken.nats.start()
    await broken.whole_again()


async def test_the_log_is_lost_between_two_attempts(broken: Breakable) -> None:
    """The next attempt starts over and generates the same text, so watchers get no rewind.

    A watcher that reconnects with an offset alone may get one, because nothing proves that it holds the same text.
    """
    id_ = await broken.submit()
    early = asyncio.create_task(watch(broken.stub, id_))
    pieces = asyncio.create_task(watch_in_pieces(broken.stub, id_, random.Random(0), tokens=1))
    offsets = asyncio.create_task(watch_in_pieces(broken.stub, id_, random.Random(0), tokens=0))
    status = await when_output_reaches(broken.stub, id_, len(broken.expected) // 2)
    worker = broken.worker_of(status)
    await worker.kill()
    client = await nats.connect(f"nats://{broken.stack.address('nats')}")
    await client.jetstream().delete_stream(FeedSettings().stream)
    await client.close()
    late = asyncio.create_task(watch(broken.stub, id_))
    watchers = [await early, await pieces, await late]
    await worker.start()
    await worker.wait_ready()
    await broken.whole_again()
    broken.check(watchers, attempts=2)
    assert (await offsets).output == broken.expected


async def test_an_equal_job_goes_on_when_the_worker_of_the_first_is_lost(broken: Breakable) -> None:
    """It waits for the answer of the first job, without a seat, until that job's claim ends. Then it generates."""
    first = await broken.submit(cache=CACHE)
    status = await when_output_reaches(broken.stub, first, len(broken.expected) // 4)
    second = await broken.submit(cache=CACHE)
    await until_message(broken.stub, second, lambda message: message.status.progress.stage == QUEUED)
    worker = broken.worker_of(status)
    await worker.kill()
    async with asyncio.timeout(60):
        watchers = [await watch(broken.stub, id_) for id_ in (second, first)]
    broken.check(watchers)
    assert not watchers[0].final.result.metadata.cached
    await worker.start()
    await worker.wait_ready()
    third = await watch(broken.stub, await broken.submit(cache=CACHE))
    broken.check([third])
    assert third.final.result.metadata.cached


async def test_a_zombie_cannot_write(broken: Breakable) -> None:
    """A worker is suspended until Temporal has started another attempt. Every reader ignores what it writes later.

    The engine generates the same tokens again, so the zombie's own records would be right by chance. The test therefore
    appends wrong text in its name, and another attempt that starts too late.
    """
    id_ = await broken.submit()
    early = asyncio.create_task(watch(broken.stub, id_))
    pieces = asyncio.create_task(watch_in_pieces(broken.stub, id_, random.Random(0)))
    status = await when_output_reaches(broken.stub, id_, len(broken.expected) // 4)
    log = asyncio.create_task(whole_log(broken.stack, status.run_id))
    zombie = broken.worker_of(status)
    zombie.signal(signal.SIGSTOP)
    try:
        await when_another_makes_output(broken.stub, id_, status.progress.worker)
    finally:
        zombie.signal(signal.SIGCONT)
    late = asyncio.create_task(watch(broken.stub, id_))
    watchers = [await early, await pieces, await late]
    broken.check(watchers, attempts=2)
    records = await log
    (first, *_) = writers = list(dict.fromkeys(record.writer for record in records))
    assert len(writers) >= 3, "two attempts and the forged one must have written"
    takeover = next(n for n, record in enumerate(records) if record.writer == writers[1])
    assert any(record.writer == first for record in records[takeover:]), "the zombie wrote nothing after the takeover"


async def when_another_makes_output(stub: LlmServiceStub, id_: str, worker: str) -> None:
    """Return once another worker generates the job's output."""

    def on_another(message: llm_pb2.StreamStatusResponse) -> bool:
        progress = message.status.progress
        return progress.stage == "decode" and progress.worker != worker

    await until_message(stub, id_, on_another)


async def whole_log(stack: Stack, key: str) -> list[internal_pb2.FeedRecord]:
    """Return the job's log up to the end of its second attempt. Append forged records once that attempt has started."""
    feed = NatsFeed(FeedSettings(url=SecretStr(f"nats://{stack.address('nats')}")))
    feed.start()
    records: list[internal_pb2.FeedRecord] = []
    wrong = internal_pb2.TokensMade(text="WRONG")
    starts: list[str] = []
    second = asyncio.Event()

    def take(record: internal_pb2.FeedRecord) -> bool:
        records.append(record)
        event = record.WhichOneof("event")
        # An attempt that finds the broker restarted writes its AttemptStarted a second time.
        if event == "attempt_started" and record.writer not in (*starts, "forged"):
            starts.append(record.writer)
            if len(starts) == 2:
                second.set()
        return event == "attempt_ended" and record.writer == starts[-1] and len(starts) >= 2

    async with asyncio.timeout(60):
        reading = asyncio.create_task(feed.read(key, take))
        await second.wait()
        takeover = internal_pb2.AttemptStarted(attempt=1)
        await feed.append(key, internal_pb2.FeedRecord(writer=starts[0], tokens_made=wrong))
        await feed.append(key, internal_pb2.FeedRecord(writer="forged", attempt_started=takeover))
        await feed.append(key, internal_pb2.FeedRecord(writer="forged", tokens_made=wrong))
        await reading
    await feed.close()
    return records
