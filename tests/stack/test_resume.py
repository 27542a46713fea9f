"""Every reader finally holds the job's result, whatever was generated, lost and replaced meanwhile.

The tests join the real parts in one process: attempts write into a feed, watches read it, and readers leave and
reconnect at any watch. Only Temporal is replaced by a fake, which knows the result once there is one.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Final

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.metrics import NoOpMeter

from feed.memory import MemoryFeed
from jobs.errors import WorkerLost, to_status
from jobs.resume_token import ResumeToken
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime.auth import Caller
from services.gateway.settings import GatewaySettings
from services.gateway.streams.watch import Watch
from services.gpu_worker.attempt import Attempt
from services.gpu_worker.engines.engine import Output
from services.gpu_worker.report_throttle import ReportThrottle
from services.gpu_worker.settings import GpuWorkerSettings
from tests.support.jobs import Seen, new_job, until_message, watch

KEY: Final = "run"
ENGINE: Any = SimpleNamespace(name="played", gpu=llm_pb2.GpuInfo())
LAG: Final = NoOpMeter("test").create_histogram("lag")
ROOM: Final = 4096
"""Maximum bytes of output in one message."""
ALPHABET: Final = "aé🙂"
"""Characters of one, two and four bytes. They are few, so that two texts often have a common prefix."""


class PlayedTemporal:
    """Fake of the JobReader that a Watch uses."""

    def __init__(self) -> None:
        self.response = llm_pb2.GetStatusResponse(status=llm_pb2.JobStatus(run_id=KEY, state=llm_pb2.JOB_STATE_RUNNING))
        self._ended = asyncio.Event()

    def end(self, result: llm_pb2.JobResult) -> None:
        self.response.status.state = llm_pb2.JOB_STATE_SUCCEEDED
        self.response.result.CopyFrom(result)
        self._ended.set()

    async def describe(self, _: Caller, __: str) -> Any:
        async def memo_value(_: str, default: Any, type_hint: Any = None) -> Any:
            return default

        return SimpleNamespace(typed_search_attributes={}, memo_value=memo_value, id="llmjob-u-r")

    async def status_of(self, *_: Any) -> llm_pb2.GetStatusResponse:
        response = llm_pb2.GetStatusResponse()
        response.CopyFrom(self.response)
        return response

    async def ending(self, *_: Any) -> None:
        await self._ended.wait()


class Reader:
    """A client with its output and its open stream."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._reading: asyncio.Task[None] | None = None

    @property
    def away(self) -> bool:
        return self._reading is None

    def come(self, watch: Watch, *, with_token: bool) -> None:
        """Open a stream at the offset of the last message, `with_token` with its resume token as well."""
        token = ResumeToken.parse(self.seen.resume_token) if with_token else None
        self._reading = asyncio.create_task(self._read(watch, token))

    async def _read(self, watch: Watch, token: ResumeToken | None) -> None:
        async for message in watch.messages(self.seen.next_offset, lambda: ROOM, token):
            self.seen.add(message)

    async def leave(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None

    async def read_to_the_end(self) -> None:
        assert self._reading is not None
        await self._reading


class Job:
    """A running job with the watches of two gateways."""

    def __init__(self) -> None:
        self.feed = MemoryFeed()
        self.temporal = PlayedTemporal()
        self.attempt: Attempt | None = None
        self.number = 0
        self.token_id = 0
        self.heartbeat: internal_pb2.RunHeartbeat | None = None
        self.watches = [self.new_watch(), self.new_watch()]

    def new_watch(self) -> Watch:
        reader: Any = self.temporal
        return Watch("llmjob-u-r", reader, self.feed, GatewaySettings(), LAG)

    async def generate(self, text: str, *, starts_over: bool) -> None:
        attempt = self.attempt or await self._begin(starts_over=starts_over)
        self.token_id += 1
        await attempt.add(Output(text, (self.token_id,), 1))

    async def _begin(self, *, starts_over: bool) -> Attempt:
        self.number += 1
        request = internal_pb2.RunRequest(job=new_job())
        now, settings = datetime.now(UTC), GpuWorkerSettings()
        self.attempt = Attempt(request, self.number, now, KEY, "w", self.feed, settings, ReportThrottle())
        if self.heartbeat is not None:
            self.attempt.restore(self.heartbeat)
        if await self.attempt.start(first=self.number == 1) and starts_over:
            self.attempt.start_over()
        return self.attempt

    async def end(self) -> str:
        attempt = self.attempt or await self._begin(starts_over=True)
        result = attempt.result(ENGINE, llm_pb2.FINISH_REASON_STOP)
        self.temporal.end(result)
        await attempt.end(llm_pb2.FINISH_REASON_STOP)
        return result.output

    async def close(self) -> None:
        for one in self.watches:
            await one.close()


async def everybody_goes_on() -> None:
    """Let all tasks run until each waits."""
    for _ in range(30):
        await asyncio.sleep(0)


async def play(data: st.DataObject) -> None:
    job, readers = Job(), [Reader(), Reader()]
    for one in job.watches:
        await one.known()
    steps = st.sampled_from(["generate", "generate", "generate", "crash", "beat", "lose", "come", "leave", "restart"])
    for step in data.draw(st.lists(steps, max_size=30), "steps"):
        reader = data.draw(st.sampled_from(readers), "reader") if step in ("come", "leave") else readers[0]
        if step == "generate":
            text = data.draw(st.text(ALPHABET, min_size=1, max_size=3), "text")
            await job.generate(text, starts_over=data.draw(st.booleans(), "starts over"))
        elif step == "crash":
            job.attempt = None
        elif step == "beat" and job.attempt is not None:
            job.heartbeat = job.attempt.heartbeat()
        elif step == "lose":
            await job.feed.remove(KEY)
            # A running attempt would publish its output again, so the attempt is lost, too.
            job.attempt = None
        elif step == "come" and reader.away:
            reader.come(data.draw(st.sampled_from(job.watches), "watch"), with_token=data.draw(st.booleans(), "token"))
        elif step == "leave":
            await reader.leave()
        elif step == "restart" and all(reader.away for reader in readers):
            await job.watches[0].close()
            job.watches[0] = job.new_watch()
            await job.watches[0].known()
        if data.draw(st.booleans(), "pause"):
            await everybody_goes_on()
    output = (await job.end()).encode()
    for reader in readers:
        if reader.away or data.draw(st.booleans(), "leaves at the end"):
            await reader.leave()
            right, rewinds = output.startswith(reader.seen.output), reader.seen.rewinds
            with_token = bool(reader.seen.resume_token) and data.draw(st.booleans(), "token")
            late = job.new_watch()
            await late.known()
            job.watches.append(late)
            reader.come(late, with_token=with_token)
            await reader.read_to_the_end()
            assert not (right and with_token) or reader.seen.rewinds == rewinds, "a rewind without a reason"
        else:
            async with asyncio.timeout(20):
                await reader.read_to_the_end()
        assert reader.seen.output == output
    await job.close()


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_whatever_happens_a_reader_holds_the_result_in_the_end(data: st.DataObject) -> None:
    asyncio.run(play(data))


def reported(tokens: int) -> llm_pb2.JobProgress:
    return llm_pb2.JobProgress(output_tokens=tokens, worker="w", updated_at=Timestamp(seconds=1000 + tokens))


def at_work(*tokens: int) -> list[internal_pb2.FeedRecord]:
    """Return the records of an attempt that has reported these numbers of tokens."""
    started = internal_pb2.AttemptStarted(attempt=1, start_time=Timestamp(seconds=1000))
    return [
        internal_pb2.FeedRecord(writer="one", attempt_started=started),
        *(internal_pb2.FeedRecord(writer="one", progress=reported(count)) for count in tokens),
    ]


async def statuses(job: Job, records: Sequence[internal_pb2.FeedRecord]) -> list[llm_pb2.JobStatus]:
    """Return the statuses that a watcher sees while the records come one by one."""
    reader = Reader()
    await job.watches[0].known()
    reader.come(job.watches[0], with_token=False)
    for record in records:
        await everybody_goes_on()
        await job.feed.append(KEY, record)
    await everybody_goes_on()
    await reader.leave()
    await job.close()
    return [message.status for message in reader.seen.messages if message.HasField("status")]


async def test_records_from_before_what_temporal_knows_take_no_progress_back() -> None:
    """A watch begins with the last heartbeat and then reads the feed's log from its start."""
    job = Job()
    job.temporal.response.status.attempt = 1
    job.temporal.response.status.progress.CopyFrom(reported(20))
    seen = await statuses(job, at_work(1, 10, 19, 21))
    assert [status.progress.output_tokens for status in seen][:1] == [20]
    assert {status.progress.output_tokens for status in seen} == {20, 21}


async def test_a_job_whose_outcome_is_settled_does_not_run_again() -> None:
    """The feed's log may still exist and show a running attempt."""
    job = Job()
    settled = job.temporal.response.status
    settled.attempt, settled.state = 1, llm_pb2.JOB_STATE_NOTIFYING
    settled.progress.CopyFrom(reported(20))
    assert await statuses(job, at_work(1, 10, 20)) == [settled]


async def test_an_attempt_that_has_failed_does_not_run_for_whoever_comes_between_two() -> None:
    """The log has the start of the failed attempt, but not yet that of the next one."""
    job = Job()
    waiting = job.temporal.response.status
    waiting.attempt, waiting.state = 1, llm_pb2.JOB_STATE_QUEUED
    waiting.error.CopyFrom(to_status(WorkerLost("fell silent")))
    second = internal_pb2.AttemptStarted(attempt=2, start_time=Timestamp(seconds=1030))
    log = at_work(10)
    for record in log:
        await job.feed.append(KEY, record)
    seen = await statuses(job, [internal_pb2.FeedRecord(writer="two", attempt_started=second)])
    states = {status.attempt: llm_pb2.JobState.Name(status.state) for status in seen}
    assert states == {1: "JOB_STATE_QUEUED", 2: "JOB_STATE_RUNNING"}


@pytest.mark.parametrize("with_token", [True, False])
@pytest.mark.parametrize("closed", [True, False])
async def test_a_reader_that_comes_back_after_a_rewind_gets_the_text_that_counts(
    stub: LlmServiceStub, *, with_token: bool, closed: bool
) -> None:
    """It holds the first attempt's text, and reconnects when the second attempt's text has replaced it."""
    job = new_job("Say something. [[vary]] [[fault:failed@60:once]]", params={"max_tokens": 150})
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    whole = asyncio.create_task(watch(stub, id_))
    seen = Seen()
    async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=60):
        seen.add(message)
        if seen.next_offset > 20:
            break
    if closed:
        await whole
    else:
        # Wait until another reader has passed the rewind.
        await until_message(stub, id_, lambda message: message.status.attempt > 1 and message.next_offset > 40)
    request = llm_pb2.StreamStatusRequest(workflow_id=id_, output_offset=seen.next_offset)
    if with_token:
        request.resume_token = seen.resume_token
    async for message in stub.StreamStatus(request, timeout=60):
        seen.add(message)
    assert seen.rewinds >= 1
    assert seen.output.decode() == seen.final.result.output
    assert seen.final.result.metadata.rewinds >= 1
    assert (await whole).output == seen.output


async def test_a_reader_whose_text_still_counts_is_not_taken_back(stub: LlmServiceStub) -> None:
    """After a rewind of the job its token proves that it holds the second attempt's text."""
    job = new_job("Say something. [[vary]] [[fault:failed@40:once]]", params={"max_tokens": 80})
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    whole = await watch(stub, id_)
    assert whole.final.result.metadata.rewinds >= 1
    counted = [message.rewinds for message in whole.messages]
    assert counted == sorted(counted)
    assert counted[-1] == whole.final.result.metadata.rewinds
    assert all(message.rewinds for message in whole.messages if message.delta.rewind)
    rewind = max((place for place, message in enumerate(whole.messages) if message.delta.rewind), default=0)
    # On a busy machine the second attempt's text may come in few messages. Earlier ones have the first one's text.
    for message in whole.messages[rewind:][-10:]:
        seen = Seen(output=whole.output[: message.next_offset], next_offset=message.next_offset)
        request = llm_pb2.StreamStatusRequest(workflow_id=id_, resume_token=message.resume_token)
        async for again in stub.StreamStatus(request, timeout=60):
            seen.add(again)
        assert (seen.rewinds, seen.output) == (0, whole.output)
