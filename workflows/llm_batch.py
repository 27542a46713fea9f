"""LLMBatchWorkflow: one batch from its acceptance to its end.

    check the lines (PlanBatch) ──▶ run them in chunks (RunBatchChunk) ─┐
        ┌───────────────────────────────────────────────────────────────┘
        └─▶ write output and errors (MergeBatch) ──▶ notify of the outcome (NotifyUI) ──▶ close

It closes as a job does: SUCCEEDED is Completed, CANCELLED is Canceled, FAILED and EXPIRED are Failed with the reason as
the type. Its memo then holds the BatchStatus and the BatchProgress, by which results are read.

A run of the workflow begins no more chunks once it has begun so many or Temporal suggests to continue in a new one. The
new one begins when all of them have ended.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, CancelledError

with workflow.unsafe.imports_passed_through():
    from jobs import batches, errors, ids, names
    from jobs.events import batch_event, notification, targets_of
    from jobs.inputs import one_input
    from jobs.memo import to_memo
    from llm_pb import batch_pb2, internal_pb2, llm_pb2
    from workflows.outcome_metrics import record_batch

from workflows import activities
from workflows.batch_chunks import Chunks
from workflows.batch_steps import merge, start_plan, stop_of
from workflows.cancellation import Cancellation
from workflows.deliveries import DeliveryLoops, deliver_outcome
from workflows.running_chunks import STEP_RETRIES, STEP_TIMEOUT
from workflows.token_leases import leased

_T = TypeVar("_T")


@workflow.defn(name=names.BATCH_WORKFLOW_TYPE)
class LLMBatchWorkflow:
    """Runs one batch."""

    @workflow.init
    @one_input
    def __init__(self, run: internal_pb2.BatchRun | None = None) -> None:
        info = workflow.info()
        self._run = internal_pb2.BatchRun()
        if run is not None:
            self._run.CopyFrom(run)
        self._id = info.workflow_id
        self._tenant = ids.tenant_of(info.workflow_id)
        self._progress = self._run.progress
        options = self._run.options
        if not options.HasField("create_time"):
            options.create_time.FromDatetime(info.workflow_start_time)
        if not options.HasField("expire_time"):
            options.expire_time.FromDatetime(options.create_time.ToDatetime(UTC) + batches.DEFAULT_WINDOW)
        planned = self._progress.HasField("plan")
        self._status = batch_pb2.BatchStatus(
            batch_id=info.workflow_id,
            state=batch_pb2.BATCH_STATE_RUNNING if planned else batch_pb2.BATCH_STATE_VALIDATING,
            create_time=options.create_time,
            expire_time=options.expire_time,
            trace_id=ids.trace_id(workflow.memo_value(names.MEMO_TRACEPARENT, "")),
        )
        batches.describe(self._status, self._run.batch)
        self._cancellation = Cancellation()
        self._deliveries = DeliveryLoops(internal_pb2.DeliveryState())
        self._stop: batches.Stop | None = None
        self._window: asyncio.Task[None] | None = None
        self._unfinished: list[int] = []
        self._chunks: Chunks | None = None
        self._written: list[int] = []

    @workflow.run
    @one_input
    async def run(self, run: internal_pb2.BatchRun | None = None) -> batch_pb2.BatchStatus:
        """Run the batch to its end, and return its status. Closes as the module's docstring says."""
        left = self._run.options.expire_time.ToDatetime(UTC) - workflow.now()
        self._window = asyncio.create_task(_over(left))
        if not self._progress.HasField("plan"):
            await self._plan()
        if self._progress.HasField("plan") and not self._progress.plan.HasField("error"):
            self._status.state = batch_pb2.BATCH_STATE_RUNNING
            await self._run_chunks()
            await self._merge()
        return await self._close()

    @workflow.signal(name=names.SIGNAL_CANCEL)
    @one_input
    def cancel(self, request: llm_pb2.CancelRequest | None = None) -> None:
        """Ask the batch to stop. This changes nothing once its items have ended."""
        self._cancellation.note(request.reason if request else "")

    @workflow.query(name=names.QUERY_GET_RECORD)
    def get_record(self) -> internal_pb2.BatchRecord:
        """Return what is known here: counts and usage are those of ended chunks."""
        return internal_pb2.BatchRecord(
            status=self._now(),
            progress=self._progress,
            options=self._run.options,
            begun_chunks=self._chunks.begun if self._chunks is not None else (),
            written_chunks=self._written,
        )

    @workflow.query(name=names.QUERY_GET_DELIVERIES)
    def get_deliveries(self) -> internal_pb2.DeliveryState:
        """Return the state of the deliveries, as of the batch's close if it has closed."""
        return self._deliveries.state

    def _now(self) -> batch_pb2.BatchStatus:
        status = batch_pb2.BatchStatus()
        status.CopyFrom(self._status)
        status.counts.CopyFrom(self._progress.counts)
        status.usage.CopyFrom(self._progress.usage)
        status.bad_lines = self._progress.plan.bad_count
        status.cancel_requested = self._cancellation.error is not None
        if self._progress.HasField("start_time"):
            status.start_time.CopyFrom(self._progress.start_time)
        return status

    def _is_over(self) -> bool:
        """Return whether the batch has to stop, and note why. The first reason counts."""
        if self._stop is None:
            if self._cancellation.error is not None:
                self._stop = batches.stop_cancelled(errors.message_of(self._cancellation.error))
            elif self._has_to_stop() or workflow.now() >= self._run.options.expire_time.ToDatetime(UTC):
                self._stop = batches.stop_expired()
        return self._stop is not None

    def _has_to_stop(self) -> bool:
        """Return whether the batch was cancelled or its window is over. For conditions, which must change nothing."""
        return self._cancellation.error is not None or (self._window is not None and self._window.done())

    async def _plan(self) -> None:
        """Plan the batch, unless it has to stop meanwhile."""
        planning = start_plan(self._run, self._id, self._tenant)
        await self._cancellation.wait(lambda: planning.done() or self._has_to_stop())
        planning.cancel()
        await self._cancellation.wait(planning.done)
        stopped = self._is_over()
        try:
            plan = planning.result()
        except asyncio.CancelledError:
            return
        except ActivityError as error:
            if not stopped:
                self._stop = stop_of(error, "PLAN_FAILED")
            return
        self._progress.plan.CopyFrom(plan)
        self._progress.counts.total = sum(group.count for group in plan.groups)
        if plan.HasField("error"):
            self._stop = batches.Stop(batch_pb2.BATCH_STATE_FAILED, plan.error)
            if plan.HasField("bad_lines"):
                self._status.errors.CopyFrom(plan.bad_lines)
            if plan.HasField("bad_items"):
                self._progress.rest.CopyFrom(plan.bad_items)

    async def _run_chunks(self) -> None:
        """Run the chunks until all have ended or the batch has to stop. May continue as a new run."""
        chunks, full = Chunks(self._run, self._id, self._tenant), False
        self._chunks = chunks
        recent = self._run.options.manifest_chunks or batches.MANIFEST_CHUNKS
        leasing: asyncio.Task[internal_pb2.LeaseResponse] | None = None
        while not chunks.finished() and not self._is_over():
            if leasing is not None and leasing.done():
                chunks.grow(leasing.result())
                leasing = None
            full = full or chunks.run_is_long or workflow.info().is_continue_as_new_suggested()
            chunks.resume()
            if not full:
                chunks.begin()
                if not self._progress.HasField("start_time"):
                    self._progress.start_time.FromDatetime(workflow.now())
            if chunks.failure is not None:
                self._stop = chunks.failure
                break
            asked = chunks.lease_to_ask_for()
            if chunks.idle and (full or asked is None):
                chunks.note_begun(self._progress)
                workflow.continue_as_new(self._run)
            if asked is not None and leasing is None:
                leasing = asyncio.create_task(leased(chunks.lease_to_ask_for, chunks.give_back))
            await self._cancellation.wait(_any_news(chunks, leasing, self._has_to_stop))
            self._note(chunks.take())
            self._stop = self._stop or chunks.failure
            if self._stop is None and not chunks.finished():
                self._stop = batches.stop_of_use(self._run.batch, self._progress)
            if len(self._progress.recent) >= recent:
                await self._write_manifest()
        if leasing is not None:
            # What it may still get is free again with the end of the batch.
            leasing.cancel()
        self._status.state = batch_pb2.BATCH_STATE_FINALIZING
        self._note(await self._finish(chunks.stop(self._stop)))
        self._unfinished = chunks.unfinished
        await self._write_manifest()

    def _note(self, ended: Iterable[internal_pb2.EndedChunk]) -> None:
        """Add ended chunks to the sums and to the list."""
        for chunk in ended:
            batches.add_ended(self._progress, chunk)

    async def _write_manifest(self) -> None:
        progress = self._progress
        if not progress.recent:
            return
        request = internal_pb2.ManifestRequest(batch_id=self._id)
        request.manifest.chunks.extend(progress.recent)
        writing = workflow.execute_activity(
            activities.write_manifest, request, start_to_close_timeout=STEP_TIMEOUT, retry_policy=STEP_RETRIES
        )
        manifest = await self._finish(writing)
        # No await between the two: whoever asks must see each chunk once.
        progress.manifests.append(manifest)
        self._written = [chunk.chunk for chunk in request.manifest.chunks]
        del progress.recent[: len(request.manifest.chunks)]

    async def _merge(self) -> None:
        progress, options = self._progress, self._run.options
        request = internal_pb2.MergeRequest(
            batch_id=self._id,
            input=progress.plan.input,
            batch=self._run.batch,
            tenant=self._tenant,
            manifests=progress.manifests,
            items=progress.counts.total,
            limits=options.limits,
            create_time=options.create_time,
        )
        if self._stop is not None:
            request.otherwise = self._stop.items
            request.error.CopyFrom(self._stop.error)
        try:
            merged = await self._finish(merge(request))
        except ActivityError as error:
            self._stop = stop_of(error, "MERGE_FAILED")
            return
        if merged.HasField("output"):
            self._status.output.CopyFrom(merged.output)
        if merged.HasField("errors"):
            self._status.errors.CopyFrom(merged.errors)
        if merged.HasField("rest"):
            progress.rest.CopyFrom(merged.rest)
        progress.counts.CopyFrom(merged.counts)

    async def _close(self) -> batch_pb2.BatchStatus:
        """Notify of the outcome, publish it, and close with it."""
        cleaning = workflow.execute_activity(
            activities.clean_batch,
            internal_pb2.CleanRequest(
                batch_id=self._id,
                progress=self._progress,
                ledger=self._run.options.ledger,
                chunks=self._unfinished,
                waiter=workflow.memo_value(names.MEMO_WAITER, ""),
            ),
            start_to_close_timeout=STEP_TIMEOUT,
            retry_policy=STEP_RETRIES,
        )
        await self._finish(cleaning)
        # Temporal alone makes the state final: the workflow's own stays FINALIZING.
        stop, status = self._stop, self._now()
        status.state = stop.state if stop is not None else batch_pb2.BATCH_STATE_SUCCEEDED
        status.end_time.FromDatetime(workflow.now())
        if stop is not None:
            status.error.CopyFrom(stop.error)
        await self._notify(status)
        status.notifications.extend(map(notification, self._deliveries.state.deliveries))
        state = batch_pb2.BatchState.Name(status.state)
        if status.state == batch_pb2.BATCH_STATE_CANCELLED:
            await self._cancellation.request()
        workflow.upsert_search_attributes([names.JOB_STATE.value_set(state)])
        workflow.upsert_memo({names.MEMO_STATUS: to_memo(status), names.MEMO_RECORD: to_memo(self._progress)})
        record_batch(status)
        workflow.logger.info("batch ended", extra={"state": state})
        if stop is None:
            return status
        # A pipeline of which the batch is a step counts what it has used.
        if status.state == batch_pb2.BATCH_STATE_CANCELLED:
            raise CancelledError(stop.error.message, status)
        raise ApplicationError(stop.error.message, status, type=errors.reason_of(stop.error), non_retryable=True)

    async def _notify(self, outcome: batch_pb2.BatchStatus) -> None:
        """Notify the receivers of the outcome. Deliveries that do not succeed soon are left to a workflow of their
        own."""
        options = self._run.options.delivery
        if not self._run.options.HasField("delivery"):
            return
        batch = self._run.batch
        event = batch_event(batch, outcome, workflow.info().run_id)
        await deliver_outcome(event, targets_of(batch, options), options, self._cancellation, self._take_deliveries)

    def _take_deliveries(self, deliveries: DeliveryLoops) -> None:
        self._deliveries = deliveries

    async def _finish(self, step: Coroutine[Any, Any, _T]) -> _T:
        """Return what a step returns. A cancel meanwhile is noted, and does not reach the step."""
        task = asyncio.ensure_future(step)
        await self._cancellation.wait(task.done)
        return task.result()


async def _over(left: timedelta) -> None:
    """Return when the window is over."""
    if left > timedelta(0):
        await workflow.sleep(left)


def _any_news(
    chunks: Chunks, leasing: asyncio.Task[internal_pb2.LeaseResponse] | None, has_to_stop: Callable[[], bool]
) -> Callable[[], bool]:
    """Return a condition: a chunk has ended, the ledger has answered, or the batch has to stop."""
    return lambda: chunks.has_news() or has_to_stop() or (leasing is not None and leasing.done())
