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
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

with workflow.unsafe.imports_passed_through():
    from jobs import batches, errors, names
    from jobs.classes import queue_of
    from jobs.leases import Lease, Leases, Spent, limits_of
    from llm_pb import common_pb2, internal_pb2

from workflows import activities

STEP_RETRIES: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
"""Without a last attempt: a store or worker that is away delays the batch."""
STEP_TIMEOUT: Final = timedelta(minutes=2)
_GRACE: Final = timedelta(minutes=10)
"""Time for which a chunk may be longer than the window of its batch: the workflow cancels it at the window's end."""
_HEARTBEAT_TIMEOUT: Final = timedelta(seconds=30)
_MAX_TASK_BYTES: Final = 2 * 1024 * 1024
"""Size of the chunks that a step of the workflow starts together, at most about so much: Temporal refuses 4 MB."""
_OWN_BYTES: Final = 4096
"""Size of a chunk's request without the batch, about."""
_MAX_IDLE_STARTS: Final = 20
"""Number of times that a chunk may end without having done anything."""


class _Running:
    """A chunk that runs or waits."""

    def __init__(self, chunk: batches.Chunk) -> None:
        self.chunk = chunk
        self.starts = 0
        self.idle_starts = 0
        self.result = internal_pb2.ChunkResult()
        """What it has done, as far as that is known here."""
        self.handle: workflow.ActivityHandle[internal_pb2.ChunkResult] | None = None
        """None while it waits for a lease."""
        self.is_last = False
        """Whether it has all that is left of the batch's budget."""

    @property
    def has_ended(self) -> bool:
        return self.handle is not None and self.handle.done()


class Chunks:
    """Runs the chunks of a plan, from the first one that has not ended."""

    def __init__(self, run: internal_pb2.BatchRun, batch_id: str, tenant: str) -> None:
        self._run = run
        self._batch_id = batch_id
        self._tenant = tenant
        self._all = batches.chunks_of(run.progress.plan, run.options)
        self._next = run.progress.ended_chunks
        self._running: dict[int, _Running] = {}
        self._batch = internal_pb2.ChunkRequest().batch
        self._batch.CopyFrom(run.batch)
        self._batch.ClearField("input")
        limited = bool(limits_of(run.batch.budget)) and workflow.patched(names.PATCH_LEASES)
        self._leases = Leases(
            run.batch.budget if limited else common_pb2.Budget(), batches.max_chunks(run.options, run.batch)
        )
        self.incomplete = False
        """Whether a chunk has ended with items left that do not run any more."""
        self.failure: batches.Stop | None = None
        """Why the batch cannot go on."""

    @property
    def next_number(self) -> int:
        """Number of chunks that have begun."""
        return self._next

    @property
    def run_is_long(self) -> bool:
        """Whether as many chunks have begun in this run of the workflow as are to begin in one."""
        return 0 < self._run.options.run_chunks <= self._next - self._run.progress.ended_chunks

    @property
    def all_begun(self) -> bool:
        """Whether there is no chunk left to begin."""
        return self._next == len(self._all)

    def finished(self) -> bool:
        """Return whether every item has ended by itself."""
        return self.all_begun and not self._running and not self.incomplete

    @property
    def idle(self) -> bool:
        """Whether no chunk runs or waits."""
        return not self._running

    def has_news(self) -> bool:
        """Return whether a chunk has ended, or the last one was ended."""
        return not self._running or any(running.has_ended for running in self._running.values())

    def begin(self) -> None:
        """Start as many further chunks as there is room for."""
        fit = _MAX_TASK_BYTES // (self._batch.ByteSize() + _OWN_BYTES)
        most = min(batches.max_chunks(self._run.options, self._run.batch), max(fit, 1))
        while not self.all_begun and not self.run_is_long and len(self._running) < most:
            first = min(self._running, default=self._next)
            if self._next >= first + batches.span(self._run.options):
                return
            running = _Running(self._all[self._next])
            if not self._start(running):
                return
            self._running[self._next] = running
            self._next += 1

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
                self.incomplete = True
                yield self._ended(number)
                continue
            running.handle = None
            self._start(running)

    async def stop(self) -> list[internal_pb2.EndedChunk]:
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
        return [self._ended(number) for number in [*self._running]]

    def _ended(self, number: int) -> internal_pb2.EndedChunk:
        self._leases.drop(number)
        return internal_pb2.EndedChunk(chunk=number, result=self._running.pop(number).result)

    def _start(self, running: _Running) -> bool:
        """Start a chunk, and return whether there was a lease for it."""
        chunk, run = running.chunk, self._run
        lease = self._leases.lease(chunk.number, chunk.group, run.progress.usage, running.result)
        if isinstance(lease, Spent):
            self._spend(lease.field)
        if not isinstance(lease, Lease):
            return False
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
            grant=lease.grant if self._leases.limited else None,
            last_grant=lease.last,
            max_concurrent=batches.concurrent_items(run.options, run.batch),
            default_max_tokens=chunk.group.default_max_tokens,
            price=chunk.group.price if chunk.group.HasField("price") else None,
        )
        left = run.options.expire_time.ToDatetime(UTC) - workflow.now()
        limit = run.options.heartbeat_timeout.ToTimedelta() or _HEARTBEAT_TIMEOUT
        running.handle = workflow.start_activity(
            activities.run_batch_chunk,
            request,
            task_queue=queue_of(chunk.group.queue, run.batch.job_class or common_pb2.JOB_CLASS_BACKGROUND),
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

    def _settle(self, running: _Running) -> None:
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
