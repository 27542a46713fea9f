"""The delivery loops of the outcome of a job, batch or pipeline, for workflows. Each attempt is a run of NotifyUI.

Each target has a loop of its own, so that a receiver that fails or hangs delays no other. The job's workflow starts the
loops and stays open for a few seconds. LLMDeliveryWorkflow continues the deliveries that are left, from the same state.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, WorkflowAlreadyStartedError

with workflow.unsafe.imports_passed_through():
    from jobs import errors, names
    from jobs.events import base_event, event_type, targets_of, wants
    from jobs.ids import delivery_workflow_id, unshortened_delivery_workflow_id
    from jobs.targets import describe
    from llm_pb import internal_pb2, llm_pb2

from workflows import activities
from workflows.cancellation import Cancellation

_KEPT_ATTEMPTS: Final = 50
_JITTER: Final = 0.2
"""Maximum fraction by which a wait is longer or shorter, so that deliveries that failed together are not retried
together."""
_MAX_EXPONENT: Final = 64
_LOST: Final = "no notifier reported the outcome in time: none took the delivery, or the one that did was lost"
_NO_START_FRACTION: Final = 0.25
"""Last part of the time that a job is held open. An attempt that began in it would have too little time left."""
_PROGRESS_HEARTBEAT: Final = timedelta(seconds=10)
"""Heartbeat timeout of NotifyProgress. After it another notifier continues."""


def new_state(
    event: internal_pb2.NotifyRequest,
    targets: Sequence[llm_pb2.NotifyTarget],
    options: internal_pb2.JobOptions,
    now: datetime,
) -> internal_pb2.DeliveryState:
    """Return the state of an event's deliveries: one for each target, none of them begun."""
    state = internal_pb2.DeliveryState(event=event, options=options, targets=targets)
    for index, target in enumerate(targets):
        state.deliveries.add(
            id=f"{event.status.run_id}-finished-{index}",
            type=event_type(event),
            target=describe(target),
            state=llm_pb2.NOTIFY_STATE_PENDING,
            target_index=index,
        ).give_up_time.FromDatetime(now + options.notify_retry.within.ToTimedelta())
    return state


def start_progress(
    job: llm_pb2.JobRequest, status: llm_pb2.JobStatus, options: internal_pb2.JobOptions, within: timedelta
) -> workflow.ActivityHandle[internal_pb2.NotifyProgressResponse] | None:
    """Start to notify the targets of the job's progress, until cancelled; return None if the job does not ask for
    it."""
    targets = targets_of(job, options)
    if not targets or not wants(job, llm_pb2.NOTIFY_EVENT_STARTED, llm_pb2.NOTIFY_EVENT_PROGRESS):
        return None
    return workflow.start_activity(
        activities.notify_progress,
        internal_pb2.NotifyProgressRequest(
            event=base_event(job, llm_pb2.NOTIFY_EVENT_PROGRESS, status),
            targets=targets,
            options=job.notify_options,
        ),
        task_queue=options.notify_task_queue + names.PROGRESS_QUEUE_SUFFIX,
        schedule_to_close_timeout=within,
        heartbeat_timeout=_PROGRESS_HEARTBEAT,
        cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
    )


def next_attempt(
    retry: internal_pb2.RetryOptions,
    tries: int,
    began: datetime,
    now: datetime,
    end: datetime,
    asked: timedelta,
    chance: float,
) -> datetime | None:
    """Return when to try again after this number of tries; None to give up.

    `began` is when the last attempt began. If that was before `end`, one more attempt follows, at `end` at the latest
    or now if that has passed, however long the notifiers were unavailable. `asked` is the wait that the receiver asked
    for. `chance` is a number from 0 to 1 that spreads the waits.
    """
    if tries >= retry.maximum_attempts or began >= end:
        return None
    longest = retry.maximum_interval.ToTimedelta()
    factor = retry.backoff_coefficient ** min(tries - 1, _MAX_EXPONENT)
    seconds = min(retry.initial_interval.ToTimedelta().total_seconds() * factor, longest.total_seconds())
    wait = timedelta(seconds=seconds * (1 - _JITTER + 2 * _JITTER * chance))
    return max(min(now + max(wait, min(asked, longest)), end), now)


async def deliver_outcome(
    event: internal_pb2.NotifyRequest,
    targets: Sequence[llm_pb2.NotifyTarget],
    options: internal_pb2.JobOptions,
    cancellation: Cancellation,
    started: "Callable[[DeliveryLoops], None]",
) -> None:
    """Notify the receivers of the outcome of a batch or pipeline. What does not succeed soon, its own workflow goes on
    with. `started` gets the loops, which then know how the deliveries stand."""
    now = workflow.now()
    loops = DeliveryLoops(new_state(event, targets, options, now))
    started(loops)
    loops.start(now + options.notify_hold.ToTimedelta())
    await cancellation.wait(loops.idle)
    leaving = asyncio.create_task(loops.leave())
    await cancellation.wait(leaving.done)
    leaving.result()


class DeliveryLoops:
    """Runs the deliveries of a state, and keeps the state up to date. For use in a workflow."""

    def __init__(self, state: internal_pb2.DeliveryState) -> None:
        self.state = state
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._again: set[int] = set()
        self._hold: datetime | None = None
        self._no_more_after = datetime.max.replace(tzinfo=UTC)
        self._pausing = False

    def start(self, hold: datetime | None = None) -> None:
        """Start all pending deliveries. With `hold`, those that are not settled by then stay pending."""
        self._hold = hold
        if hold is not None:
            self._no_more_after = hold - (hold - workflow.now()) * _NO_START_FRACTION
        for index, delivery in enumerate(self.state.deliveries):
            if delivery.state == llm_pb2.NOTIFY_STATE_PENDING and index not in self._tasks:
                self._tasks[index] = asyncio.create_task(self._deliver(index))

    def idle(self) -> bool:
        """Return whether no loop runs. Raises the exception of a loop that failed."""
        for task in self._tasks.values():
            if task.done():
                task.result()
        return all(task.done() for task in self._tasks.values())

    def send_again(self, ids: Collection[str]) -> None:
        """Send the deliveries with these ids again, or all without ids, immediately and with a fresh schedule."""
        within = self.state.options.notify_retry.within.ToTimedelta()
        for index, delivery in enumerate(self.state.deliveries):
            if not ids or delivery.id in ids:
                delivery.state = llm_pb2.NOTIFY_STATE_PENDING
                delivery.give_up_time.FromDatetime(workflow.now() + within)
                delivery.ClearField("next_attempt_time")
                self._again.add(index)
                if index not in self._tasks or self._tasks[index].done():
                    self._tasks[index] = asyncio.create_task(self._deliver(index))

    async def leave(self) -> None:
        """Hand the pending deliveries, if there are any, over to an LLMDeliveryWorkflow. Wait until it has started."""
        if all(item.state != llm_pb2.NOTIFY_STATE_PENDING for item in self.state.deliveries):
            return
        job = workflow.info().workflow_id
        id_, earlier = delivery_workflow_id(job), unshortened_delivery_workflow_id(job)
        if id_ != earlier and not workflow.patched(names.PATCH_SHORTENED_DELIVERY_IDS):
            id_ = earlier
        try:
            await workflow.start_child_workflow(
                names.DELIVERY_WORKFLOW_TYPE,
                self.state,
                id=id_,
                parent_close_policy=workflow.ParentClosePolicy.ABANDON,
            )
        except WorkflowAlreadyStartedError:
            self.stop(errors.DeliveryFailed("an earlier job under this id is still being delivered"))

    def pause(self) -> None:
        """Begin no more attempts. The loops are idle once the current attempts have ended; the rest stays pending."""
        self._pausing = True

    def stop(self, error: errors.JobError) -> None:
        """Give up all pending deliveries."""
        for delivery in self.state.deliveries:
            if delivery.state == llm_pb2.NOTIFY_STATE_PENDING:
                delivery.state = llm_pb2.NOTIFY_STATE_FAILED
                delivery.ClearField("next_attempt_time")
                self._note(delivery, llm_pb2.DeliveryAttempt(error=errors.to_status(error)))

    async def _deliver(self, index: int) -> None:
        delivery = self.state.deliveries[index]
        while delivery.state == llm_pb2.NOTIFY_STATE_PENDING:
            if delivery.HasField("next_attempt_time"):
                due = delivery.next_attempt_time.ToDatetime(UTC)
                if self._too_late(due):
                    return
                await self._until_due(index, due)
                # Temporal's timers are up to a second late.
                if self._pausing or self._too_late(workflow.now()):
                    return
            self._again.discard(index)
            began = workflow.now()
            response = await self._attempt(index)
            delivery.target = response.target or delivery.target
            delivery.ClearField("next_attempt_time")
            if response.HasField("attempt"):
                self._note(delivery, response.attempt)
            if index in self._again:
                continue
            delivery.state = response.state
            if response.state == llm_pb2.NOTIFY_STATE_PENDING:
                self._schedule(delivery, began, response.retry_after.ToTimedelta())

    def _too_late(self, when: datetime) -> bool:
        return when > self._no_more_after

    async def _until_due(self, index: int, due: datetime) -> None:
        wait = max(due - workflow.now(), timedelta(0))
        try:
            await workflow.wait_condition(lambda: index in self._again or self._pausing, timeout=wait)
        except TimeoutError:
            return

    def _schedule(self, delivery: llm_pb2.Delivery, began: datetime, asked: timedelta) -> None:
        retry, end = self.state.options.notify_retry, delivery.give_up_time.ToDatetime(UTC)
        since = end - retry.within.ToTimedelta()
        tries = sum(attempt.time.ToDatetime(UTC) >= since for attempt in delivery.attempts)
        due = next_attempt(retry, max(tries, 1), began, workflow.now(), end, asked, workflow.random().random())
        if due is None:
            delivery.state = llm_pb2.NOTIFY_STATE_FAILED
        else:
            delivery.next_attempt_time.FromDatetime(due)

    async def _attempt(self, index: int) -> internal_pb2.NotifyResponse:
        delivery, target, options = self.state.deliveries[index], self.state.targets[index], self.state.options
        request = internal_pb2.NotifyRequest()
        request.CopyFrom(self.state.event)
        request.notification_id = delivery.id
        request.target_index = index
        if target.WhichOneof("target") is not None:
            request.target.CopyFrom(target)
        now = workflow.now()
        limit = options.notify_timeout.ToTimedelta()
        # After the job has closed, the delivery waits in the queue until a notifier is available.
        wait = max(delivery.give_up_time.ToDatetime(UTC) - now, timedelta(0)) + limit
        if self._hold is not None:
            limit = wait = max(min(limit, self._hold - now), timedelta(milliseconds=1))
        try:
            return await workflow.execute_activity(
                activities.notify_ui,
                request,
                task_queue=options.notify_task_queue,
                schedule_to_close_timeout=wait,
                start_to_close_timeout=limit,
                retry_policy=RetryPolicy(maximum_attempts=1),
                summary=delivery.target or None,
            )
        except ActivityError:
            lost = llm_pb2.DeliveryAttempt(error=errors.to_status(errors.DeliveryFailed(_LOST)))
            lost.time.FromDatetime(now)
            return internal_pb2.NotifyResponse(state=llm_pb2.NOTIFY_STATE_PENDING, attempt=lost)

    def _note(self, delivery: llm_pb2.Delivery, attempt: llm_pb2.DeliveryAttempt) -> None:
        if not attempt.HasField("time"):
            attempt.time.FromDatetime(workflow.now())
        delivery.attempts.append(attempt)
        del delivery.attempts[:-_KEPT_ATTEMPTS]
