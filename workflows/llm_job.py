"""LLMJobWorkflow: one job from its acceptance to its end.

    run the model (RunLLMOnGPU) ──▶ settle the outcome ──▶ notify of it (NotifyUI, one for each target) ──▶ close
    notify of progress, if asked to (NotifyProgress)   │        └─ not delivered soon ──▶ LLMDeliveryWorkflow
                                                       └──▶ remove the live feed, release the slot (ForgetFeed)

The last attempt returns the job's output as it ends. If it could not report its end, its output is read back from the
live feed (RecoverOutput) before the outcome is settled.

Every wait in here goes through `Cancellation.wait`, so that a cancel is noted wherever the job is and acted upon in one
place. A cancel comes as the signal Cancel or from Temporal itself (Web UI, `temporal workflow cancel`).

How it closes:

| outcome   | native status | how                                                                             |
|-----------|---------------|---------------------------------------------------------------------------------|
| SUCCEEDED | Completed     | the JobResult is the workflow's result                                          |
| CANCELLED | Canceled      | only a workflow that Temporal was asked to cancel can close so: after a signal  |
|           |               | the workflow asks Temporal itself (RequestCancel)                               |
| FAILED    | Failed        | an ApplicationError; its type is the reason, its detail the partial JobResult   |
| TIMED_OUT | Timed out     | when the total time is spent: settles the outcome, waits for Temporal to end it |
|           | Failed        | after the limits of queue and run, and in a step that has a timeout of its own: |
|           |               | a workflow cannot close itself as timed out                                     |
"""

import asyncio
from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from jobs import attempts, costs, errors, names, options, rules
    from jobs.events import notification, outcome_event, targets_of, wants
    from jobs.handover import add_handover, add_reported_times, is_pause, paused_progress, queue_timeout
    from jobs.inputs import one_input
    from jobs.outcome import TOTAL_SPENT, add_attempt, add_result, classify_failure, final_state, total_spent
    from jobs.times import TotalTime
    from llm_pb import internal_pb2, llm_pb2
    from workflows.outcome_metrics import record_outcome

from workflows import activities
from workflows.cancellation import Cancellation
from workflows.deliveries import DeliveryLoops, new_state, start_progress
from workflows.ordered_activities import start_in_order
from workflows.outcome import attributes, publish, raise_failure
from workflows.status import first_status
from workflows.watch_lease import WatchLease

_MAX_HANDOVERS: Final = 100
"""Maximum number of hand-overs by workers that had to stop. A job that needs more is probably the cause of them."""


@workflow.defn(name=names.JOB_WORKFLOW_TYPE)
class LLMJobWorkflow:
    """Runs one JobRequest and returns its JobResult."""

    @workflow.init
    @one_input
    def __init__(self, job: llm_pb2.JobRequest | None = None) -> None:
        """Read the options from the memo. A workflow that was started by hand has none and gets the defaults.

        A workflow that was not started with exactly one input has an empty job, which breaks the rules.
        """
        self._job = job if job is not None else llm_pb2.JobRequest()
        self._error: errors.JobError | None = None
        self._ended_at = workflow.now()
        try:
            chosen = options.read_memo(workflow.memo_value)
        except ValueError as error:
            chosen, self._error = None, errors.InvalidJob(f"memo {names.MEMO_OPTIONS}: {error}")
        self._without_options = chosen is None or job is None
        self._patched = False
        self._options = options.complete(chosen, self._job)
        self._cancellation = Cancellation()
        self._lease = WatchLease(self._cancellation, workflow.memo_value(names.MEMO_CANCEL_IF_UNWATCHED, None))
        self._result: llm_pb2.JobResult | None = None
        self._deliveries = DeliveryLoops(internal_pb2.DeliveryState())
        self._progress_activity: workflow.ActivityHandle[internal_pb2.NotifyProgressResponse] | None = None
        self._status = first_status(self._job)

    @workflow.run
    @one_input
    async def run(self, job: llm_pb2.JobRequest | None = None) -> llm_pb2.JobResult:
        """Return the result of a job that succeeded. Otherwise close as the module's table shows."""
        self._patched = self._without_options and workflow.patched(names.PATCH_BY_HAND)
        valid = self._is_valid()
        if valid and self._patched:
            # No gateway has set them. An invalid job gets none, because its values may break Temporal's rules, too.
            workflow.upsert_search_attributes(attributes(self._job))
        self._lease.start()
        final = await self._run_model() if valid else llm_pb2.JOB_STATE_FAILED
        self._settle_outcome(final)
        if final == llm_pb2.JOB_STATE_CANCELLED:
            self._cancellation.decide()
        # A job without a slot and a waiter passes no arguments, so that its history is as it ever was.
        slot = ("", self._options.ledger, costs.used_tokens(self._result)) if self._options.ledger else ()
        waiter = workflow.memo_value(names.MEMO_WAITER, "")
        forgetting = workflow.start_local_activity(
            activities.forget_feed,
            args=(*(slot or ("", "", 0)), waiter) if waiter else slot,
            start_to_close_timeout=timedelta(seconds=10),
            retry_policy=RetryPolicy(maximum_attempts=1),
        )
        await self._notify(final)
        await self._cancellation.wait(forgetting.done)
        # The retention removes the records of a feed that was unavailable.
        forgetting.exception()
        self._status.state = final
        workflow.logger.info("job ended", extra={"state": llm_pb2.JobState.Name(final)})
        return await self._close(final)

    @workflow.signal(name=names.SIGNAL_CANCEL)
    @one_input
    def cancel(self, request: llm_pb2.CancelRequest | None = None) -> None:
        """Ask the job to stop. This changes nothing once its outcome is settled."""
        self._cancellation.note(request.reason if request else "")

    @workflow.signal(name=names.SIGNAL_WATCHED)
    def watched(self) -> None:
        """Note that somebody watches the job."""
        self._lease.renew()

    @workflow.query(name=names.QUERY_GET_STATUS)
    def get_status(self) -> llm_pb2.GetStatusResponse:
        """Return the status as the workflow knows it: QUEUED until the outcome is settled, and without progress unless
        the job is paused.

        Attempt, error and times are those of the last attempt before a hand-over. The gateway adds what Temporal knows
        of a pending activity.
        """
        return llm_pb2.GetStatusResponse(status=self._public_status(), result=self._result)

    @workflow.query(name=names.QUERY_GET_DELIVERIES)
    def get_deliveries(self) -> internal_pb2.DeliveryState:
        """Return the state of the deliveries, as of the job's close if it has closed."""
        return self._deliveries.state

    def _public_status(self) -> llm_pb2.JobStatus:
        status = llm_pb2.JobStatus()
        status.CopyFrom(self._status)
        status.cancel_requested = self._cancellation.error is not None
        status.notifications.extend(map(notification, self._deliveries.state.deliveries))
        return status

    def _is_valid(self) -> bool:
        """Return whether the job keeps the rules. No gateway has checked a job that was started by hand."""
        if self._without_options:
            try:
                if self._error is not None:
                    raise self._error
                rules.require_valid(self._job, strict=self._patched)
            except errors.InvalidJob as error:
                self._error = error
                # Nothing that it asks for counts, so only the operator's endpoint is notified of its end.
                self._job = llm_pb2.JobRequest()
                self._options = options.complete(None, self._job)
                return False
        return True

    async def _run_model(self) -> "llm_pb2.JobState.ValueType":
        """Run the model until the job ends; return the final state. Result and error are left in their fields.

        A worker that has to stop, or has no seat for the job, hands it over, and it continues elsewhere without using
        up an attempt.
        """
        self._progress_activity = start_progress(self._job, self._status, self._options, self._time_to_run())
        request = options.run_request(self._job, self._status.create_time, self._options)
        costs.set_price(request, self._options)
        while request.handovers - request.unseated < _MAX_HANDOVERS:
            await self._run_activity(request)
            if self._error is None or not errors.RULES[type(self._error)].handed_over:
                break
            add_handover(request, self._result)
            self._note_attempt()
            self._status.ClearField("progress")
            if self._result is not None and is_pause(self._result):
                # A pause is no error.
                self._status.ClearField("error")
                self._status.progress.CopyFrom(paused_progress(request, self._result))
        return final_state(self._error)

    async def _run_activity(self, request: internal_pb2.RunRequest) -> None:
        timeouts, within = self._options.timeouts, self._time_to_run()
        retry = internal_pb2.RetryOptions()
        retry.CopyFrom(self._options.gpu_retry)
        retry.maximum_attempts -= request.earlier_attempts
        run = workflow.start_activity(
            activities.run_llm_on_gpu,
            request,
            task_queue=self._options.gpu_task_queue,
            schedule_to_start_timeout=queue_timeout(request, timeouts.queue.ToTimedelta(), workflow.now()),
            start_to_close_timeout=timeouts.run.ToTimedelta(),
            schedule_to_close_timeout=within,
            heartbeat_timeout=self._options.heartbeat_timeout.ToTimedelta(),
            retry_policy=options.retry_policy(retry),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            summary=self._job.model,
            priority=options.gpu_priority(self._job, workflow.info().priority),
        )
        await self._cancellation.wait(lambda: run.done() or self._cancellation.error is not None)
        if not run.done():
            run.cancel()
            await self._cancellation.wait(run.done)
        # The time is read before RecoverOutput. In jobs of earlier versions a replay can find another one after it.
        self._ended_at = workflow.now()
        self._error = None
        try:
            self._result = run.result()
        except asyncio.CancelledError:
            # Cancelled before Temporal knew of the activity.
            self._error = self._cancellation.error
        except ActivityError as failure:
            self._error, partial = classify_failure(failure.cause)
            if total_spent(self._error, timeouts, within) and workflow.patched(names.PATCH_TOTAL_TIMEOUT):
                self._error = errors.TotalTimeout(TOTAL_SPENT)
            self._result = partial or await self._recover_output(request, failure.cause) or self._result
            if self._result is not None:
                attempts.settle(self._result, request.attempts, self._error, self._ended_at)
            if self._cancellation.error is not None:
                # No attempt follows a cancel, so the cancel ended the job, whatever ended the last attempt.
                self._error = self._cancellation.error
        else:
            if self._result.finish_reason == llm_pb2.FINISH_REASON_CANCELLED:
                self._error = self._cancellation.error or errors.Cancelled("cancelled on request")

    async def _recover_output(
        self, request: internal_pb2.RunRequest, cause: BaseException | None
    ) -> llm_pb2.JobResult | None:
        """Return the job's output in the live feed; None if no attempt began, or the feed is unavailable."""
        recovering = start_in_order(
            activities.recover_output,
            *("", self._options.max_output_bytes, self._options.max_inline_bytes),
            start_to_close_timeout=timedelta(seconds=30),
            # The gateway that runs the first attempt may die.
            retry_policy=RetryPolicy(maximum_attempts=2),
        )
        await self._cancellation.wait(recovering.done)
        if recovering.exception() is not None:
            return None
        result = recovering.result()
        result.metadata.model = self._job.model
        add_reported_times(result, request, cause)
        return result if result.metadata.attempts else None

    def _note_attempt(self) -> None:
        """Write the error and the times of the last attempt into the status."""
        self._status.ClearField("error")
        if self._error is not None:
            self._status.error.CopyFrom(errors.to_status(self._error))
        if self._result is not None:
            add_attempt(self._status, self._result)

    def _settle_outcome(self, final: "llm_pb2.JobState.ValueType") -> None:
        """Write the outcome into the status. The history holds the end of the attempt, so the outcome is durable."""
        self._lease.stop()
        status, result = self._status, self._result
        status.state = llm_pb2.JOB_STATE_NOTIFYING
        status.end_time.FromDatetime(self._ended_at)
        self._note_attempt()
        if result is not None:
            if final == llm_pb2.JOB_STATE_CANCELLED:
                # The result may be of an attempt that failed before the cancel came.
                result.finish_reason = llm_pb2.FINISH_REASON_CANCELLED
            add_result(status, result, final)
            costs.add_cost(result.metadata, self._options)
        record_outcome(self._job, final, self._error, self._cancellation.noted_at, result)

    async def _notify(self, final: "llm_pb2.JobState.ValueType") -> None:
        """Notify the receivers of the outcome. Deliveries that do not succeed soon are left to a workflow of its
        own."""
        outcome = llm_pb2.JobStatus()
        outcome.CopyFrom(self._status)
        outcome.cancel_requested = self._cancellation.error is not None
        outcome.state = final
        if (progress_activity := self._progress_activity) is not None:
            progress_activity.cancel()
        now = workflow.now()
        targets = targets_of(self._job, self._options) if wants(self._job, llm_pb2.NOTIFY_EVENT_FINISHED) else []
        state = new_state(outcome_event(self._job, outcome, self._result), targets, self._options, now)
        self._deliveries = DeliveryLoops(state)
        self._deliveries.start(now + min(self._options.notify_hold.ToTimedelta(), (self._total_time().end - now) / 2))
        await self._cancellation.wait(self._deliveries.idle)
        if progress_activity is not None:
            await self._cancellation.wait(progress_activity.done)
            if not progress_activity.cancelled() and progress_activity.exception() is None:
                state.earlier.extend(progress_activity.result().deliveries)
        leaving = asyncio.create_task(self._deliveries.leave())
        await self._cancellation.wait(leaving.done)
        leaving.result()

    def _time_to_run(self) -> timedelta:
        return self._total_time().to_run(workflow.now())

    def _total_time(self) -> TotalTime:
        info = workflow.info()
        total = self._options.timeouts.total.ToTimedelta()
        return TotalTime(info.workflow_start_time, total, info.execution_timeout)

    async def _close(self, final: "llm_pb2.JobState.ValueType") -> llm_pb2.JobResult:
        if final == llm_pb2.JOB_STATE_CANCELLED:
            await self._cancellation.request()
        publish(
            self._public_status(),
            self._result,
            attributes(self._job) if self._without_options and not self._patched else (),
        )
        if self._error is not None:
            await raise_failure(self._error, self._result, self._cancellation, self._total_time())
        return self._result or llm_pb2.JobResult()
