"""LLMScheduledWorkflow: one run of a schedule, from its time to the end of what it starts.

That is a job, a batch or a pipeline; a job stands for all three here.

    schedule of Temporal ──its time has come──▶ LLMScheduledWorkflow
        ──StartScheduledJob──▶ the gateway checks and starts the job as Submit does, or refuses it
        ◀──signal JobSettled── the job, once its outcome is settled
        ──CheckScheduledJob──▶ the job has ended: write the outcome into the memo, close

Temporal appends the time to the id of what a schedule starts, so a job that it started itself would have neither its
own id, nor the checks, quota and options of Submit. The job is no child: its result would be stored once more in the
history of its parent, where no deletion of the job finds it.

The run is open until its job has ended, because the overlap policy counts it as running so long. A job that Temporal
or an operator ended sends no signal, so the run also asks from time to time.

A cancel of the run (the overlap policy CANCEL_OTHER, or an operator) cancels the job. A termination does not, and
neither does the deletion of the schedule.
"""

import asyncio
from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from google.rpc import code_pb2

    from jobs import errors, names
    from jobs.inputs import one_input
    from jobs.memo import to_memo
    from jobs.schedules import has_failed
    from llm_pb import internal_pb2, schedule_pb2
    from workflows.outcome_metrics import record_run

from workflows import activities
from workflows.cancellation import Cancellation
from workflows.ordered_activities import start_in_order

_START_TIMEOUT: Final = timedelta(seconds=45)
"""Timeout of one try to start the job."""
_START_WITHIN: Final = timedelta(minutes=10)
"""Time for which the start is tried while Temporal, keys or quotas cannot be reached."""
_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
_CHECK_TIMEOUT: Final = timedelta(seconds=15)
_FIRST_CHECK: Final = timedelta(seconds=30)
_LAST_CHECK: Final = timedelta(minutes=10)
"""Pauses between two checks of a job that has sent no signal: the first one, which doubles, and the longest."""
_SETTLED_CHECK: Final = timedelta(milliseconds=200)
"""The first pause after the signal: the job closes with its next step, or once its deliveries are made."""
_NO_INPUT: Final = "the workflow takes one ScheduledAction"


@workflow.defn(name=names.SCHEDULED_WORKFLOW_TYPE)
class LLMScheduledWorkflow:
    """Starts the job of one time of a schedule, and returns how it ended."""

    @workflow.init
    @one_input
    def __init__(self, action: internal_pb2.ScheduledAction | None = None) -> None:
        info = workflow.info()
        self._action = action
        self._cancellation = Cancellation()
        self._settled = False
        # Started by hand, it has no time but its own.
        nominal = info.typed_search_attributes.get(names.SCHEDULED_TIME) or info.workflow_start_time
        self._run = schedule_pb2.ScheduleRun()
        self._run.nominal_time.FromDatetime(nominal.replace(microsecond=0))
        self._run.start_time.FromDatetime(info.workflow_start_time)

    @workflow.run
    @one_input
    async def run(self, action: internal_pb2.ScheduledAction | None = None) -> schedule_pb2.ScheduleRun:
        """Return how the run ended. Raises ApplicationError for one that failed, if the schedule pauses then."""
        if self._action is None:
            raise ApplicationError(_NO_INPUT)
        job = await self._start(self._action)
        self._run.workflow_id = job.workflow_id
        if not job.ended:
            self._publish()
            job = await self._until_ended(job.workflow_id)
        self._run.state = job.state
        if job.HasField("error"):
            self._run.error.CopyFrom(job.error)
        failed = has_failed(job)
        self._run.failures_in_a_row = _failures_before() + 1 if failed else 0
        record_run(self._action, job)
        self._publish()
        if failed and self._action.schedule.pause_on_failure:
            raise ApplicationError(job.error.message, type=names.RUN_FAILED)
        return self._run

    @workflow.signal(name=names.SIGNAL_JOB_SETTLED)
    def job_settled(self) -> None:
        """Note that the job's outcome is settled."""
        self._settled = True

    async def _start(self, action: internal_pb2.ScheduledAction) -> internal_pb2.ScheduledJob:
        starting = workflow.start_activity(
            activities.start_scheduled_job,
            internal_pb2.StartScheduledJobRequest(
                schedule=action.schedule,
                nominal_time=self._run.nominal_time,
                canary=action.canary,
                scopes=action.scopes,
            ),
            start_to_close_timeout=_START_TIMEOUT,
            schedule_to_close_timeout=_START_WITHIN,
            retry_policy=_RETRY,
        )
        # A cancel waits: only once the job is known to be started, or not, is there something to cancel.
        await self._cancellation.wait(starting.done)
        try:
            return starting.result()
        except ActivityError as failure:
            error = errors.make_status(code_pb2.UNAVAILABLE, f"the job could not be started in time: {failure.cause}")
            return internal_pb2.ScheduledJob(error=error, ended=True)

    async def _until_ended(self, job_id: str) -> internal_pb2.ScheduledJob:
        """Return the job once it has ended. Cancel it if the run is cancelled."""
        pause, settled, cancelled = _FIRST_CHECK, False, False
        while True:
            if self._settled and not settled:
                settled, pause = True, _SETTLED_CHECK
            await self._sleep(pause, settled=settled, cancelled=cancelled)
            if self._settled and not settled:
                continue
            pause = min(2 * pause, _LAST_CHECK)
            reason = "" if self._cancellation.error is None or cancelled else str(self._cancellation.error)
            found = await self._check(job_id, reason)
            if found is not None:
                if found.ended:
                    return found
                cancelled = cancelled or bool(reason)

    async def _sleep(self, pause: timedelta, *, settled: bool, cancelled: bool) -> None:
        """Sleep until the pause is over, or until something happens that was not known before."""

        def news() -> bool:
            return (self._settled and not settled) or (self._cancellation.error is not None and not cancelled)

        timer = asyncio.create_task(asyncio.sleep(pause.total_seconds()))
        try:
            await self._cancellation.wait(lambda: timer.done() or news())
        finally:
            timer.cancel()

    async def _check(self, job_id: str, cancel_reason: str) -> internal_pb2.ScheduledJob | None:
        """Return how the job stands; None if that is not known now."""
        checking = start_in_order(
            activities.check_scheduled_job,
            internal_pb2.CheckScheduledJobRequest(workflow_id=job_id, cancel_reason=cancel_reason),
            start_to_close_timeout=_CHECK_TIMEOUT,
            retry_policy=RetryPolicy(maximum_attempts=1),
        )
        await self._cancellation.wait(checking.done)
        return None if checking.cancelled() or checking.exception() is not None else checking.result()

    def _publish(self) -> None:
        workflow.upsert_memo({names.MEMO_RUN: to_memo(self._run)})


def _failures_before() -> int:
    """Return the number of failed runs in a row before this one. Temporal passes on the result of the run before."""
    if not workflow.has_last_completion_result():
        return 0
    before = workflow.get_last_completion_result(schedule_pb2.ScheduleRun)
    return before.failures_in_a_row if before is not None else 0
