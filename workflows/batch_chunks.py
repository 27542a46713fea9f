"""The chunks of one batch, for LLMBatchWorkflow: activities of which so many run or wait that every worker is busy.

A chunk that ends with items left is started again with what it has done, until the batch stops. What an activity cannot
return any more, its last heartbeat holds: Temporal has that in the failure of a timeout, and CollectChunks reads it
before a cancel, after which Temporal would drop it.
"""

import asyncio
from collections.abc import Iterator
from datetime import UTC, timedelta
from typing import Final

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

with workflow.unsafe.imports_passed_through():
    from jobs import batches, errors, names
    from jobs.classes import queue_of
    from jobs.leases import Lease, Leases, Spent, limits_of
    from llm_pb import common_pb2, internal_pb2

from workflows import activities
from workflows.running_chunks import STEP_RETRIES, STEP_TIMEOUT, RunningChunk, Window
from workflows.token_leases import lease_request

_GRACE: Final = timedelta(minutes=10)
"""Time for which a chunk may be longer than the window of its batch: the workflow cancels it at the window's end. By so
much may the clocks of workers be ahead."""
_HEARTBEAT_TIMEOUT: Final = timedelta(seconds=30)
_MAX_TASK_BYTES: Final = 2 * 1024 * 1024
"""Size of the chunks that a step of the workflow starts together, at most about so much: Temporal refuses 4 MB."""
_OWN_BYTES: Final = 4096
"""Size of a chunk's request without the batch, about."""
_MAX_IDLE_STARTS: Final = 20
"""Number of times that a chunk may end without having done anything."""


class Chunks:
    """Runs the chunks of a plan, from the first one of each kind that has not ended.

    Those of watched items come last in the plan, and run at the same time as the others.
    """

    def __init__(self, run: internal_pb2.BatchRun, batch_id: str, tenant: str) -> None:
        self._run = run
        self._batch_id = batch_id
        self._tenant = tenant
        self._all = batches.chunks_of(run.progress.plan, run.options)
        watched = sum(chunk.group.watched for chunk in self._all)
        first, end = len(self._all) - watched, len(self._all)
        most = batches.max_chunks(run.options, run.batch)
        self._others = Window(0, first, run.progress.ended_chunks, most)
        self._watched = Window(first, end, first + run.progress.ended_watched, batches.WATCHED_CHUNKS)
        self._running: dict[int, RunningChunk] = {}
        self._batch = internal_pb2.ChunkRequest().batch
        self._batch.CopyFrom(run.batch)
        self._batch.ClearField("input")
        limited = bool(limits_of(run.batch.budget)) and workflow.patched(names.PATCH_LEASES)
        self._leases = Leases(
            run.batch.budget if limited else common_pb2.Budget(),
            batches.max_chunks(run.options, run.batch),
            run.progress.leased_tokens if run.options.HasField("leased_a_day") else None,
        )
        # It may hold a secret, and no item needs it.
        self._batch.ClearField("notify")
        self.incomplete = False
        """Whether a chunk has ended with items left that do not run any more."""
        self.unfinished: list[int] = []
        """The chunks that have ended so."""
        self.failure: batches.Stop | None = None
        """Why the batch cannot go on."""

    def note_begun(self, progress: internal_pb2.BatchProgress) -> None:
        """Write down where the next run of the workflow begins, once no chunk runs."""
        progress.ended_chunks = self._others.next
        progress.ended_watched = self._watched.next - self._watched.first

    @property
    def run_is_long(self) -> bool:
        """Whether as many chunks have begun in this run of the workflow as are to begin in one."""
        progress, watched = self._run.progress, self._watched.next - self._watched.first
        begun = self._others.next - progress.ended_chunks + watched - progress.ended_watched
        return 0 < self._run.options.run_chunks <= begun

    @property
    def all_begun(self) -> bool:
        """Whether there is no chunk left to begin."""
        return self._others.next == self._others.end and self._watched.next == self._watched.end

    def finished(self) -> bool:
        """Return whether every item has ended by itself."""
        return self.all_begun and not self._running and not self.incomplete

    @property
    def idle(self) -> bool:
        """Whether no chunk runs or waits."""
        return not self._running

    @property
    def begun(self) -> list[internal_pb2.EndedChunk]:
        """The chunks that run or wait, as their earlier activities have left them."""
        known = [(number, running.result) for number, running in self._running.items()]
        return [internal_pb2.EndedChunk(chunk=number, result=result) for number, result in known if result.done]

    def has_news(self) -> bool:
        """Return whether a chunk has ended, or the last one was ended."""
        idle = not self._running and not self._leases.lacking
        return idle or any(running.has_ended for running in self._running.values())

    def lease_to_ask_for(self) -> internal_pb2.LeaseRequest | None:
        """Return what the batch has to ask its ledger for; None if no chunk waits for output tokens."""
        if not self._leases.lacking:
            return None
        following = self._all[self._others.next : min(self._others.next + self._others.most, self._others.end)]
        return lease_request(self._batch_id, self._run, self._leases.lacking, self._running.values(), following)

    def give_back(self, tokens: int) -> None:
        """Give so many leased output tokens back with the next question to the ledger."""
        self._run.progress.leased_tokens -= tokens
        self._leases.give_back(tokens)

    def grow(self, answer: internal_pb2.LeaseResponse) -> None:
        """Take over what the ledger has answered."""
        if answer.never:
            self.failure, self.incomplete = batches.stop_never_fits(), True
        self._run.progress.leased_tokens += answer.leased_tokens
        self._leases.grow(answer.leased_tokens)

    def begin(self) -> None:
        """Start as many further chunks as there is room for."""
        fit = max(_MAX_TASK_BYTES // (self._batch.ByteSize() + _OWN_BYTES), 1)
        for window in (self._watched, self._others):
            self._begin(window, fit)

    def _begin(self, window: Window, fit: int) -> None:
        while window.next < window.end and not self.run_is_long:
            running = [number for number in self._running if window.first <= number < window.end]
            first = min(running, default=window.next)
            if len(running) >= min(window.most, fit) or window.next >= first + batches.span(self._run.options):
                return
            begun = RunningChunk(self._all[window.next])
            if not self._start(begun):
                return
            self._running[window.next] = begun
            window.next += 1

    def resume(self) -> None:
        """Start the chunks that waited for a lease, as far as there is one now."""
        for running in self._running.values():
            if running.handle is None and not self._start(running):
                return

    def take(self) -> Iterator[internal_pb2.EndedChunk]:
        """Yield the chunks that have ended since. One with items left is started again."""
        for number, running in [*self._running.items()]:
            if not running.has_ended:
                continue
            before = batches.done_count(running.result)
            self._settle(running)
            lacks = running.result.HasField("needed")
            if lacks and running.is_last:
                self._spend(next(iter(limits_of(running.result.needed)), ""))
            if batches.is_done(running.result, running.chunk):
                yield self._ended(number)
                continue
            # Workers see the end of the window by themselves, maybe a little earlier than the workflow's timer.
            if self.failure is not None or workflow.now() >= self._run.options.expire_time.ToDatetime(UTC):
                self.incomplete = True
                yield self._ended(number)
                continue
            idle = batches.done_count(running.result) == before and not lacks
            running.idle_starts = running.idle_starts + 1 if idle else 0
            if running.idle_starts == _MAX_IDLE_STARTS:
                self.failure = batches.stop_failed(batches.CHUNK_FAILED, f"chunk {number} does not get on")
                if workflow.now() >= self._run.options.expire_time.ToDatetime(UTC) - _GRACE:
                    # The clocks of the workers are ahead.
                    self.failure = batches.stop_expired()
                self.incomplete = True
                yield self._ended(number)
                continue
            running.handle = None
            self._start(running)

    async def stop(self, why: batches.Stop | None) -> list[internal_pb2.EndedChunk]:
        """Cancel what runs, wait for its end, and return what was done. Cancels of the workflow itself must wait."""
        if any(running.handle and not running.has_ended for running in self._running.values()):
            collected = await workflow.execute_activity(
                activities.collect_chunks,
                internal_pb2.CollectRequest(batch_id=self._batch_id),
                start_to_close_timeout=STEP_TIMEOUT,
                retry_policy=STEP_RETRIES,
            )
            for found in collected.chunks:
                if (known := self._running.get(found.chunk)) is not None:
                    known.result = batches.later(found.result, known.result)
        handles = [running.handle for running in self._running.values() if running.handle is not None]
        for handle in handles:
            handle.cancel()
        await asyncio.gather(*handles, return_exceptions=True)
        for running in self._running.values():
            self._settle(running)
        if why is not None:
            await self._stop_watched(why)
        return [self._ended(number) for number in [*self._running]]

    async def _stop_watched(self, why: batches.Stop) -> None:
        """End the jobs that items are: they run on when the activity that has followed them is cancelled."""
        stopping = [
            running
            for running in self._running.values()
            if running.chunk.group.watched and not batches.is_done(running.result, running.chunk)
        ]
        for running in stopping:
            self._start(running, why)
        await asyncio.gather(*[running.handle for running in stopping if running.handle], return_exceptions=True)
        for running in stopping:
            self._settle(running)

    def _ended(self, number: int) -> internal_pb2.EndedChunk:
        self._leases.drop(number)
        running = self._running.pop(number)
        if not batches.is_done(running.result, running.chunk):
            self.unfinished.append(number)
        return internal_pb2.EndedChunk(chunk=number, result=running.result)

    def _start(self, running: RunningChunk, stop: batches.Stop | None = None) -> bool:
        """Start a chunk, and return whether there was a lease for it; or with `stop` its end: then no item begins."""
        chunk, run = running.chunk, self._run
        watched, lease = chunk.group.watched, Lease(common_pb2.Budget(), last=False)
        if stop is None:
            found = self._leases.lease(chunk.number, chunk.group, run.progress.usage, running.result)
            if isinstance(found, Spent):
                self._spend(found.field)
            if not isinstance(found, Lease):
                return False
            lease = found
        running.is_last = lease.last
        request = internal_pb2.ChunkRequest(
            batch_id=self._batch_id,
            chunk=chunk.number,
            plan=run.progress.plan.plan,
            first=chunk.first,
            count=chunk.items,
            earlier=running.result if running.starts else None,
            input=run.progress.plan.input,
            batch=self._batch,
            tenant=self._tenant,
            create_time=run.options.create_time,
            expire_time=run.options.expire_time,
            grant=lease.grant if self._leases.limited and stop is None else None,
            last_grant=lease.last,
            max_concurrent=batches.concurrent_items(run.options, run.batch, watched=watched),
            default_max_tokens=chunk.group.default_max_tokens,
            price=chunk.group.price if chunk.group.HasField("price") else None,
        )
        if stop is not None:
            request.otherwise = stop.items
            request.error.CopyFrom(stop.error)
        # Whatever the class of the batch: a worker's interactive slots are for jobs. Its priority has the class.
        queue = queue_of(chunk.group.queue, common_pb2.JOB_CLASS_BACKGROUND)
        if watched:
            queue = workflow.info().task_queue + names.WATCHED_QUEUE_SUFFIX
        left = run.options.expire_time.ToDatetime(UTC) - workflow.now()
        limit = run.options.heartbeat_timeout.ToTimedelta() or _HEARTBEAT_TIMEOUT
        running.handle = workflow.start_activity(
            activities.run_batch_chunk,
            request,
            task_queue=queue,
            activity_id=f"{batches.CHUNK_ID_PREFIX}{chunk.number}-{running.starts}",
            schedule_to_close_timeout=max(left, timedelta(0)) + _GRACE,
            heartbeat_timeout=limit,
            retry_policy=STEP_RETRIES,
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            summary=chunk.group.model,
            priority=workflow.info().priority,
        )
        running.starts += 1
        return True

    def _spend(self, field: str) -> None:
        self.failure, self.incomplete = self.failure or batches.stop_spent(field), True

    def _settle(self, running: RunningChunk) -> None:
        """Take over what an ended activity has done, and note a failure that the batch does not survive."""
        found: internal_pb2.ChunkResult | None = None
        try:
            found = running.handle.result() if running.handle is not None else None
        except asyncio.CancelledError:
            # Cancelled before Temporal knew of the activity.
            pass
        except ActivityError as error:
            cause = error.cause
            if isinstance(cause, TemporalTimeoutError):
                found = batches.result_in(cause.last_heartbeat_details)
            elif isinstance(cause, ApplicationError):
                found = batches.result_in(cause.details)
                message = errors.message_of(errors.EngineFailed(cause.message))
                self.failure = batches.stop_failed(cause.type or batches.CHUNK_FAILED, message)
        running.result = batches.later(found, running.result)
        self._leases.settle(running.chunk.number, running.result.usage)
