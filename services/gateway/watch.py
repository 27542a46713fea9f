"""One Watch for each watched job, however many clients watch it.

A Watch holds the job's status and output so far, fed by the live feed and, whenever that is silent, by Temporal. Each
client has only a place in the output, so that a slow one is simply further behind: it costs no queue, gets what it
missed as one delta, and never holds up another.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextvars import Context
from typing import Final

from opentelemetry.metrics import Histogram
from temporalio.client import WorkflowExecutionDescription
from temporalio.service import RPCError

from feed.feed import Feed, Fence
from feed.transcript import Transcript
from jobs import names
from jobs.resume_token import ResumeToken
from llm_pb import llm_pb2
from services.gateway.cursor import Cursor
from services.gateway.errors import ApiError
from services.gateway.job_reader import Ending, JobReader
from services.gateway.job_record import FINAL_STATES
from services.gateway.job_traces import link_call
from services.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)
_SLOWEST: Final = 5
"""A job that waits for a worker, or whose outcome is delivered, is asked about less and less often, at last every so
many poll intervals: the feed tells when it starts, a long poll when it ends."""

_PULSES: Final = 4
"""How often watchers look in the time of a keepalive whether one is due."""


class Watch:
    """One job as its watchers see it. Begins to follow the job at once; must be closed."""

    def __init__(
        self,
        workflow_id: str,
        reader: JobReader,
        feed: Feed,
        settings: GatewaySettings,
        feed_lag: Histogram,
        earlier: "Watch | None" = None,
    ) -> None:
        """`earlier`: one of the same job that is over, and that somebody still reads."""
        self._earlier = earlier
        self.watchers = 0
        """How many clients watch. Kept by whoever has them."""
        self.user_id = ""
        """Whose job it is, once it is known."""
        self._workflow_id = workflow_id
        self._reader = reader
        self._feed = feed
        self._settings = settings
        self._feed_lag = feed_lag
        self._pulse = settings.keepalive.total_seconds() / _PULSES
        self._began = time.time()
        self._status = llm_pb2.JobStatus()
        self._result: llm_pb2.JobResult | None = None
        self._transcript = Transcript()
        self._caught_up = False
        self._fence = Fence()
        self._starts = 0
        self._status_version = 0
        self._changed = asyncio.Event()
        self._heard_at = 0.0
        self._end_expected = asyncio.Event()
        self._patience = 1
        self._stopped: ApiError | None = None
        self._description: WorkflowExecutionDescription | None = None
        self._known = asyncio.create_task(self._ask())
        # What follows is done for all watchers: it must not go on in the trace of the first one.
        self._following = asyncio.create_task(self._follow(), context=Context())
        self._following.add_done_callback(lambda _: self._wake())
        self._wake_in_time()

    @property
    def over(self) -> bool:
        """Whether there is nothing more to follow: the outcome is durable, or following it failed."""
        return self._following.done()

    async def known(self) -> None:
        """Return once the job's status is known. Raises ApiError NOT_FOUND, RPCError when Temporal is away."""
        await asyncio.shield(self._known)
        if self._description is not None:
            await link_call(self._description)

    def expect_end(self) -> None:
        """Be told that the job is about to end, which the feed of a job that is not running will not say."""
        self._end_expected.set()
        self._patience = 1

    def stop(self, error: ApiError) -> None:
        """End every stream of this watch with an error."""
        self._stopped = error
        self._wake()

    async def close(self) -> None:
        """Stop following the job."""
        self._next_pulse.cancel()
        self._known.cancel()
        self._following.cancel()
        await asyncio.gather(self._known, self._following, return_exceptions=True)

    async def messages(
        self, offset: int, room: Callable[[], int], token: ResumeToken | None = None
    ) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield what a watcher is promised in llm.proto, from a place in the output to the durable outcome.

        The place is `token` where the watcher has one, else `offset`. `room()`: how many bytes of output the next
        message may hold. Raises the error that the watch was stopped with.
        """
        told = -1
        cursor = Cursor(self._transcript, token.offset, token.digest) if token else Cursor(self._transcript, offset)
        now = asyncio.get_running_loop().time
        spoken = now()
        while True:
            changed = self._changed
            if self._stopped is not None:
                raise self._stopped
            final = self._status.state in FINAL_STATES
            if self._following.done() and not final:
                self._following.result()
            message = llm_pb2.StreamStatusResponse()
            delta = cursor.take(complete=self._caught_up or self._result is not None, final=final, most=room())
            if delta is not None:
                message.delta.CopyFrom(delta)
            elif final:
                last = llm_pb2.StreamStatusResponse(
                    status=self._status, next_offset=cursor.offset, resume_token=cursor.token
                )
                if (result := self._result) is not None:
                    last.output_omitted = result.ByteSize() > room()
                    if last.output_omitted:
                        result = llm_pb2.JobResult(finish_reason=result.finish_reason, metadata=result.metadata)
                    last.result.CopyFrom(result)
                yield last
                return
            if told != self._status_version and (told < 0 or not final):
                message.status.CopyFrom(self._status)
                told = self._status_version
            message.next_offset = cursor.offset
            message.resume_token = cursor.token
            # The next pulse would be too late for a keepalive.
            if delta is not None or message.HasField("status") or now() > spoken + (_PULSES - 1) * self._pulse:
                yield message
                spoken = now()
            if not (final or cursor.behind):
                await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _wake_in_time(self) -> None:
        """Wake the watchers now and then, for their keepalives: a timer for each message would cost more than it."""
        self._wake()
        self._next_pulse = asyncio.get_running_loop().call_later(self._pulse, self._wake_in_time)

    async def _follow(self) -> None:
        await asyncio.shield(self._known)
        if self._status.state in FINAL_STATES:
            return
        reading = asyncio.create_task(self._feed.read(self._status.run_id, self._apply, self._note_caught_up))
        reading.add_done_callback(self._note_feed_end)
        try:
            while self._status.state not in FINAL_STATES:
                ending = await self._until_worth_asking()
                try:
                    await self._ask(ending)
                except RPCError as error:
                    _log.warning("cannot ask Temporal about %s: %s", self._workflow_id, error)
                    await asyncio.sleep(self._pause())
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _until_worth_asking(self) -> Ending | None:
        """Return when Temporal may know what the feed does not say: how the job has ended; None: the feed is silent."""
        notifying = self._status.state == llm_pb2.JOB_STATE_NOTIFYING
        if not notifying:
            await self._silence()
            if not self._end_expected.is_set():
                return None
        patience = self._longer_pause()
        # Unless it is notifying it goes on, whatever was expected.
        self._end_expected.clear()
        with contextlib.suppress(TimeoutError, RPCError):
            async with asyncio.timeout(patience):
                return await self._reader.ending(self._workflow_id, self._status.run_id)
        return None

    async def _silence(self) -> None:
        """Return when the feed has been silent for long enough to ask, or the job is about to end."""
        now = asyncio.get_running_loop().time
        since, pause = now(), self._pause()
        longer = self._longer_pause() if self._waits_for_worker else pause
        while True:
            until = max(since, self._heard_at) + (longer if self._waits_for_worker else pause)
            if until <= now():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(until, now() + pause)):
                    await self._end_expected.wait()
                    return

    @property
    def _waits_for_worker(self) -> bool:
        """Whether the feed is silent because there is nothing to tell, and will tell when there is."""
        return self._status.state == llm_pb2.JOB_STATE_QUEUED and self._feed.available

    def _pause(self) -> float:
        """Return the poll interval in seconds, with jitter: a gateway's watches must not ask in step."""
        return self._settings.poll.total_seconds() * random.uniform(0.75, 1.25)  # noqa: S311  # no secret

    def _longer_pause(self) -> float:
        """Return a pause twice as long as the last one, up to a limit; short again once there was news."""
        patience = self._patience
        self._patience = min(2 * patience, _SLOWEST)
        return patience * self._pause()

    async def _ask(self, ending: Ending | None = None) -> None:
        """Read the job from Temporal, which is the truth; keep what only the feed knows of an open job."""
        starts = self._starts
        description = self._description = await self._reader.describe(self._workflow_id)
        self.user_id = description.typed_search_attributes.get(names.USER_ID) or ""
        response = await self._reader.look(description, ending)
        # A copy: a part of a message keeps the whole of it in memory, here the result.
        fresh, old = llm_pb2.JobStatus(), self._status
        fresh.CopyFrom(response.status)
        if response.HasField("result"):
            self._keep(response.result)
            self._wake()
        self._earlier = None
        if fresh.state not in FINAL_STATES:
            if starts != self._starts and fresh.state == llm_pb2.JOB_STATE_QUEUED:
                # Started while Temporal was asked.
                fresh.state = old.state
                fresh.ClearField("queue")
            if old.progress.updated_at.ToNanoseconds() > fresh.progress.updated_at.ToNanoseconds():
                fresh.progress.CopyFrom(old.progress)
            if old.attempt >= fresh.attempt:
                fresh.attempt = old.attempt
                for field in ("start_time", "first_token_time"):
                    if old.HasField(field):
                        getattr(fresh, field).CopyFrom(getattr(old, field))
        if fresh.state != old.state:
            self._patience = 1
        if fresh != old:
            self._status = fresh
            self._status_version += 1
            self._wake()

    def _note_caught_up(self) -> None:
        self._caught_up = True
        self._wake()

    def _keep(self, result: llm_pb2.JobResult) -> None:
        """Know the result: in memory once, however many slow readers it has, of how many Watches."""
        earlier = self._earlier
        if earlier is not None and earlier._result == result:
            self._result, self._transcript = earlier._result, earlier._transcript
        else:
            self._result = result
            self._transcript.settle(result.output)
            self._transcript.add_rewinds(result.metadata.rewinds, result.metadata.lowest_rewind_offset)

    def _note_feed_end(self, reading: asyncio.Task[None]) -> None:
        if not reading.cancelled() and (error := reading.exception()) is not None:
            _log.error("the feed of %s broke, Temporal is asked instead", self._workflow_id, exc_info=error)

    def _apply(self, record: llm_pb2.FeedRecord) -> None:
        event = record.WhichOneof("event")
        if event == "job_ending":
            self.expect_end()
        if not self._fence.admits(record):
            # Nor is it a sign that the feed tells what there is to know: the beginning of its log may be lost.
            return
        self._heard_at = asyncio.get_running_loop().time()
        if event == "attempt_started":
            self._end_expected.clear()
            self._starts += 1
            started = record.attempt_started
            if started.attempt >= self._status.attempt:
                self._status.attempt = started.attempt
                self._status.start_time.CopyFrom(started.start_time)
                self._status.state = llm_pb2.JOB_STATE_RUNNING
                self._status.ClearField("queue")
                self._status_version += 1
        elif event == "tokens_made" and self._result is None:
            made = record.tokens_made
            self._transcript.put(made.offset, made.text)
            self._transcript.add_rewinds(made.rewinds, made.lowest_rewind_offset)
            if not self._status.HasField("first_token_time") and record.tokens_made.HasField("made_at"):
                self._status.first_token_time.CopyFrom(record.tokens_made.made_at)
                self._status_version += 1
        elif event == "progress":
            self._status.progress.CopyFrom(record.progress)
            self._status_version += 1
            made_at = record.progress.updated_at.ToNanoseconds() / 1e9
            # What was in the feed before does not lag: nobody waited for it.
            if made_at >= self._began:
                self._feed_lag.record(max(time.time() - made_at, 0.0))
        elif event == "attempt_ended":
            self.expect_end()
        self._wake()
