"""Follows one job for all its watchers: reads its live feed and, when that is silent, asks Temporal."""

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections.abc import Callable
from contextvars import Context
from typing import Final

from opentelemetry.metrics import Histogram
from temporalio.client import WorkflowExecutionDescription
from temporalio.service import RPCError

from encryption import KeysUnavailable
from feed.feed import Feed, Fence
from feed.transcript import Transcript
from llm_pb import internal_pb2, llm_pb2
from services.gateway.job_reader import Ending, JobReader
from services.gateway.job_record import FINAL_STATES, user_of
from services.gateway.job_traces import link_call
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings
from services.gateway.streams.status_merge import with_answer, with_record
from services.gateway.streams.stored_output import StoredOutput
from services.gateway.streams.watch_lease import renew_lease
from store.store import Store

_log = logging.getLogger(__name__)
_MAX_BACKOFF_FACTOR: Final = 5
"""Maximum time, in poll intervals, between two questions about a job that waits for a worker or delivers its outcome.
The feed reports when the job starts, and a long poll reports when it ends."""


class JobFollower:
    """What a gateway knows about one job. Starts following it immediately; must be closed."""

    def __init__(
        self,
        workflow_id: str,
        reader: JobReader,
        feed: Feed,
        settings: GatewaySettings,
        feed_lag: Histogram,
        on_change: Callable[[], None],
        earlier: "JobFollower | None" = None,
        store: Store | None = None,
    ) -> None:
        """`on_change` is called after each change of what is known, and when the following ends.

        `earlier`: a follower of the same job that is over, and whose output some watcher still reads. `store` holds
        outputs that are files.
        """
        self.user_id = ""
        """The job's user. Empty until the job is known."""
        self.status = llm_pb2.JobStatus()
        """The status so far. It is read-only: each change is a new message."""
        self.result: llm_pb2.JobResult | None = None
        """The result, once it is settled."""
        self.transcript = Transcript()
        """The output so far."""
        self.stored: StoredOutput | None = None
        """The output, where it is a file and the transcript is not known to be the same."""
        self._store = store
        self._workflow_id = workflow_id
        self._reader = reader
        self._feed = feed
        self._settings = settings
        self._feed_lag = feed_lag
        self._on_change = on_change
        self._earlier = earlier
        self._began = time.time()
        self._caught_up = False
        self._fence = Fence()
        self._attempt = 0
        self._starts = 0
        self._heard_at = 0.0
        self._end_expected = asyncio.Event()
        self._patience = 1
        self._description: WorkflowExecutionDescription | None = None
        self._known = asyncio.create_task(self._ask())
        # The task works for all watchers, so it must not continue the trace of the first one.
        self._following = asyncio.create_task(self._follow(), context=Context())
        self._following.add_done_callback(lambda _: on_change())

    @property
    def over(self) -> bool:
        """Whether there is nothing more to follow: the outcome is durable, or following the job failed."""
        return self._following.done()

    @property
    def complete(self) -> bool:
        """Whether the transcript holds all output of the job until now."""
        return self._caught_up or (self.result is not None and self.stored is None)

    async def known(self) -> None:
        """Wait until the job's status is known. Raises ApiError NOT_FOUND, RPCError when Temporal is unavailable."""
        await asyncio.shield(self._known)
        if self._description is not None:
            await link_call(self._description)

    def raise_failure(self) -> None:
        """Raise the error that ended the following, if it has ended."""
        if self.over:
            self._following.result()

    def expect_end(self) -> None:
        """Expect the job to end soon. The feed of a job that is not running does not report that."""
        self._end_expected.set()
        self._patience = 1

    async def close(self) -> None:
        """Stop following the job."""
        self._known.cancel()
        self._following.cancel()
        await asyncio.gather(self._known, self._following, return_exceptions=True)

    async def _follow(self) -> None:
        await asyncio.shield(self._known)
        if self.status.state in FINAL_STATES:
            return
        reading = asyncio.create_task(self._feed.read(self.status.run_id, self._apply, self._note_caught_up))
        reading.add_done_callback(self._note_feed_end)
        renewing = asyncio.create_task(renew_lease(self._reader, self._description)) if self._description else None
        try:
            while self.status.state not in FINAL_STATES:
                ending = await self._until_worth_asking()
                try:
                    await self._ask(ending)
                except (RPCError, KeysUnavailable) as error:
                    _log.warning("cannot ask Temporal about %s: %s", self._workflow_id, error)
                    await asyncio.sleep(self._pause())
        finally:
            tasks = [task for task in (reading, renewing) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_worth_asking(self) -> Ending | None:
        """Wait until Temporal may know more than the feed.

        Return how the job ended, where that is known. Return None when the feed is silent or the wait was long enough.
        """
        notifying = self.status.state == llm_pb2.JOB_STATE_NOTIFYING
        if not notifying:
            await self._silence()
            if not self._end_expected.is_set():
                return None
        patience = self._longer_pause()
        # A job that is not notifying by then continues, and the expectation was wrong.
        self._end_expected.clear()
        with contextlib.suppress(TimeoutError, RPCError, KeysUnavailable):
            async with asyncio.timeout(patience):
                return await self._reader.ending(self._workflow_id, self.status.run_id)
        return None

    async def _silence(self) -> None:
        """Wait until the feed has been silent for long enough to ask, or the job is about to end."""
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
        """Whether the feed is silent because the job waits for a worker, and will report its start."""
        return self.status.state == llm_pb2.JOB_STATE_QUEUED and self._feed.available

    def _pause(self) -> float:
        """Return the poll interval in seconds, with jitter: a gateway's watches must not ask simultaneously."""
        return self._settings.poll.total_seconds() * random.uniform(0.75, 1.25)  # noqa: S311  # no secret

    def _longer_pause(self) -> float:
        """Return a pause in seconds, twice as long as the last one up to a limit. A change of state resets it."""
        patience = self._patience
        self._patience = min(2 * patience, _MAX_BACKOFF_FACTOR)
        return patience * self._pause()

    async def _ask(self, ending: Ending | None = None) -> None:
        """Read the job from Temporal, which is the truth; keep what only the feed knows about an open job."""
        starts = self._starts
        description = self._description = await self._reader.describe(gateway_for(self._workflow_id), self._workflow_id)
        self.user_id = await user_of(description)
        response = await self._reader.status_of(description, ending)
        if response.HasField("result"):
            await self._keep(response.result)
            self._on_change()
        self._earlier = None
        known = self.status
        self.status = with_answer(known, response.status, started_meanwhile=starts != self._starts)
        if self.status.state != known.state:
            self._patience = 1
        if self.status is not known:
            self._on_change()

    def _note_caught_up(self) -> None:
        self._caught_up = True
        self._on_change()

    async def _keep(self, result: llm_pb2.JobResult) -> None:
        """Store the result. Followers of the same job share it, so that it is in memory once."""
        if result.HasField("output_file"):
            await self._keep_large(result)
            return
        earlier = self._earlier
        if earlier is not None and earlier.result == result:
            self.result, self.transcript = earlier.result, earlier.transcript
        else:
            self.result = result
            self.transcript.settle(result.output, result.logprobs)
            self.transcript.add_rewinds(result.metadata.rewinds, result.metadata.lowest_rewind_offset)

    async def _keep_large(self, result: llm_pb2.JobResult) -> None:
        """Store a result whose output is a file. Nothing is read where the transcript is the output already."""
        file, metadata = result.output_file, result.metadata
        if self.result is None or self.result.output_file != file:
            data = bytes(self.transcript.data) if len(self.transcript.data) == file.size_bytes else b""
            if data and (await asyncio.to_thread(hashlib.sha256, data)).digest() == file.sha256:
                self.transcript.settle(data.decode(), result.logprobs)
            else:
                self.stored = StoredOutput(self._store, self._workflow_id, result)
        self.result = result
        self.transcript.add_rewinds(metadata.rewinds, metadata.lowest_rewind_offset)

    def _note_feed_end(self, reading: asyncio.Task[None]) -> None:
        if not reading.cancelled() and (error := reading.exception()) is not None:
            _log.error("the feed of %s broke, Temporal is asked instead", self._workflow_id, exc_info=error)

    def _apply(self, record: internal_pb2.FeedRecord) -> None:
        event = record.WhichOneof("event")
        if event == "job_ending":
            self.expect_end()
        if not self._fence.admits(record):
            # A void record does not count as news either: the beginning of the log may be lost.
            return
        self._heard_at = asyncio.get_running_loop().time()
        if event == "attempt_started":
            self._end_expected.clear()
            self._starts += 1
            self._attempt = record.attempt_started.attempt
        elif event == "tokens_made" and self.result is None:
            made = record.tokens_made
            self.transcript.put(made.offset, made.text, made.token_offset, made.logprobs)
            self.transcript.add_rewinds(made.rewinds, made.lowest_rewind_offset)
        elif event == "progress":
            made_at = record.progress.updated_at.ToNanoseconds() / 1e9
            # Records from before the following began have no lag: nobody waited for them.
            if made_at >= self._began:
                self._feed_lag.record(max(time.time() - made_at, 0.0))
        elif event == "attempt_ended":
            self.expect_end()
        self.status = with_record(self.status, record, self._attempt, live=self._caught_up)
        self._on_change()
