"""One Watch for each watched job, however many clients watch it.

A Watch sends what a JobFollower knows about the job to all of them. Each client has only a place in the output, so a
slow client is just further behind. It needs no queue, gets what it missed as one delta, and never delays another.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Final

from opentelemetry.metrics import Histogram

from feed.feed import Feed
from jobs.outcome import without_output
from jobs.resume_token import ResumeToken
from llm_pb import llm_pb2
from services.gateway.errors import ApiError
from services.gateway.job_reader import JobReader
from services.gateway.job_record import FINAL_STATES
from services.gateway.settings import GatewaySettings
from services.gateway.streams.cursor import Cursor
from services.gateway.streams.job_follower import JobFollower
from services.gateway.streams.stored_output import StoredCursor
from store.store import Store

_PULSES: Final = 4
"""Number of wake-ups per keepalive interval, at which watchers check whether a keepalive is due."""


class Watch:
    """One job as its watchers see it. Starts following the job immediately; must be closed."""

    def __init__(
        self,
        workflow_id: str,
        reader: JobReader,
        feed: Feed,
        settings: GatewaySettings,
        feed_lag: Histogram,
        earlier: "Watch | None" = None,
        store: Store | None = None,
    ) -> None:
        """`earlier`: a Watch of the same job that is over, and that some watcher still reads.

        `store` holds outputs that are files.
        """
        self.watchers = 0
        """Number of clients that watch. The owner of the Watch counts them."""
        self._pulse = settings.keepalive.total_seconds() / _PULSES
        self._changed = asyncio.Event()
        self._stopped: ApiError | None = None
        earlier_job = earlier._job if earlier is not None else None
        self._job: JobFollower = JobFollower(
            workflow_id, reader, feed, settings, feed_lag, self._wake, earlier_job, store
        )
        self._wake_in_time()

    @property
    def over(self) -> bool:
        """Whether there is nothing more to follow: the outcome is durable, or following it failed."""
        return self._job.over

    @property
    def user_id(self) -> str:
        """The job's user, or its hash where search attributes are hashed. Empty until the job is known."""
        return self._job.user_id

    async def known(self) -> None:
        """Wait until the job's status is known. Raises ApiError NOT_FOUND, RPCError when Temporal is unavailable."""
        await self._job.known()

    def expect_end(self) -> None:
        """Expect the job to end soon. The feed of a job that is not running does not report that."""
        self._job.expect_end()

    def stop(self, error: ApiError) -> None:
        """End every stream of this watch with an error."""
        self._stopped = error
        self._wake()

    async def close(self) -> None:
        """Stop following the job."""
        self._next_pulse.cancel()
        await self._job.close()

    async def messages(
        self, offset: int, room: Callable[[], int], token: ResumeToken | None = None
    ) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield the messages that llm.proto promises a watcher, from a place in the output to the durable outcome.

        The place is `token` where the watcher has one, else `offset`. `room()` returns the maximum bytes of output in
        the next message. Raises the error with which the watch was stopped, and as StoredOutput.read.
        """
        job = self._job
        shown: llm_pb2.JobStatus | None = None
        cursor: Cursor | StoredCursor = Cursor(job.transcript, *(token or (offset,)))
        now = asyncio.get_running_loop().time
        last_sent = now()
        while True:
            changed = self._changed
            if self._stopped is not None:
                raise self._stopped
            final = job.status.state in FINAL_STATES
            if not final:
                job.raise_failure()
            message = llm_pb2.StreamStatusResponse()
            if job.stored is not None and isinstance(cursor, Cursor):
                cursor = StoredCursor(job.stored, cursor)
            if isinstance(cursor, Cursor):
                delta = cursor.take(complete=job.complete, final=final, most=room())
            else:
                delta = await cursor.take(room())
            if delta is not None:
                message.delta.CopyFrom(delta)
            elif final:
                last = llm_pb2.StreamStatusResponse(
                    status=job.status,
                    next_offset=cursor.offset,
                    resume_token=cursor.token,
                    rewinds=job.transcript.rewinds,
                )
                if logprobs := cursor.rest():
                    last.delta.offset = cursor.offset
                    last.delta.logprobs.extend(logprobs)
                if (result := job.result) is not None:
                    too_large = last.delta.ByteSize() + result.ByteSize() > room()
                    last.output_omitted = too_large or result.HasField("output_file")
                    last.result.CopyFrom(without_output(result) if last.output_omitted else result)
                yield last
                return
            if shown is not job.status and (shown is None or not final):
                shown = job.status
                message.status.CopyFrom(shown)
            message.next_offset = cursor.offset
            message.resume_token = cursor.token
            message.rewinds = job.transcript.rewinds
            # A keepalive at the next pulse would be too late.
            if delta is not None or message.HasField("status") or now() > last_sent + (_PULSES - 1) * self._pulse:
                yield message
                last_sent = now()
            if not (final or (delta is not None and cursor.behind)):
                await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _wake_in_time(self) -> None:
        """Wake the watchers periodically for their keepalives: a timer per message would cost more than the message."""
        self._wake()
        self._next_pulse = asyncio.get_running_loop().call_later(self._pulse, self._wake_in_time)
