"""NotifyProgress: notifies the targets of a running job of its progress, for as long as it runs.

It asks Temporal, which knows every attempt and its last heartbeat, and so costs the GPU worker nothing. A delivery that
fails is not repeated for long, because the next progress event replaces it.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio import activity
from temporalio.client import Client
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.service import RPCError

from encryption import KeysUnavailable
from jobs import names
from jobs.application_errors import to_attempt_error
from jobs.errors import DeliveryFailed, to_status
from jobs.events import event_type, takes_progress
from jobs.ids import owner, tenant_of
from jobs.options import DEFAULT_PROGRESS_INTERVAL
from jobs.pending import add_run, pending_run
from jobs.targets import describe
from llm_pb import internal_pb2, llm_pb2
from runtime.keyed_limiter import KeyedLimiter
from runtime.temporal import RPC_TIMEOUT
from services.notifier.dispatcher import Dispatcher
from services.notifier.settings import NotifierSettings

_log = logging.getLogger(__name__)
_POLL_SECONDS: Final = 1.0
_ATTEMPT: Final = timedelta(seconds=30)
_TRIES: Final = 3
"""Maximum number of tries to deliver the event `started`."""
_KEPT_ATTEMPTS: Final = 10


class NotifyProgress:
    """The activity, bound to this process's client and sinks."""

    def __init__(self, client: Client, dispatcher: Dispatcher, settings: NotifierSettings) -> None:
        self._client = client
        self._dispatcher = dispatcher

        def limiter(most: int, whose: str) -> KeyedLimiter:
            message = f"the progress notifications of {most} jobs of the same {whose} are under way already"
            return KeyedLimiter(most, lambda: DeliveryFailed(message))

        self._users = limiter(settings.max_progress_per_user, "user")
        self._tenants = limiter(settings.max_progress_per_tenant, "tenant")

    @activity.defn(name=names.ACTIVITY_NOTIFY_PROGRESS)
    async def __call__(self, request: internal_pb2.NotifyProgressRequest) -> internal_pb2.NotifyProgressResponse:
        """Notify until cancelled, or until no event is left; return the outcome of the deliveries.

        Raises ApplicationError, after which Temporal calls again later, if the user or tenant has too many jobs here
        already.
        """
        if not any(map(takes_progress, request.targets)):
            return internal_pb2.NotifyProgressResponse()
        tenant = tenant_of(activity.info().workflow_id or "")
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._users.acquired(owner(request.event.user_id, tenant)))
                if tenant:
                    await stack.enter_async_context(self._tenants.acquired(tenant))
            except DeliveryFailed as error:
                raise to_attempt_error(error, category=ApplicationErrorCategory.BENIGN) from error
            return await self._notify_all(request, tenant)

    async def _notify_all(
        self, request: internal_pb2.NotifyProgressRequest, tenant: str
    ) -> internal_pb2.NotifyProgressResponse:
        log = _Log(next(iter(activity.info().heartbeat_details), internal_pb2.NotifyProgressResponse()))
        running = _RunningJob(self._client, request)
        try:
            async with _beating(log), asyncio.TaskGroup() as tasks:
                following = tasks.create_task(running.follow())
                notifying = [
                    tasks.create_task(self._notify(request, index, running, log, tenant))
                    for index, target in enumerate(request.targets)
                    if takes_progress(target)
                ]
                await asyncio.wait(notifying)
                following.cancel()
        except asyncio.CancelledError:
            details = activity.cancellation_details()
            if details is None or not details.cancel_requested:
                # This notifier stops, and another one continues.
                raise
        return log.ended()

    async def _notify(
        self,
        request: internal_pb2.NotifyProgressRequest,
        index: int,
        running: "_RunningJob",
        log: "_Log",
        tenant: str,
    ) -> None:
        """Notify one target. A receiver that hangs delays no other."""
        options = request.options
        interval = options.progress_interval.ToTimedelta() or DEFAULT_PROGRESS_INTERVAL
        await running.started()
        if llm_pb2.NOTIFY_EVENT_STARTED in options.events:
            started = self._event(request, index, llm_pb2.NOTIFY_EVENT_STARTED, running.status)
            for _ in range(_TRIES):
                if not log.open(started):
                    break
                log.note(started, await self._dispatcher.deliver(started, _ATTEMPT, tenant))
                await asyncio.sleep(_POLL_SECONDS if log.open(started) else 0)
        reported_at = 0
        if llm_pb2.NOTIFY_EVENT_PROGRESS in options.events:
            # The notifier before this one may have sent one a moment ago.
            event = self._event(request, index, llm_pb2.NOTIFY_EVENT_PROGRESS, running.status)
            await asyncio.sleep(log.remaining(event, interval))
        while llm_pb2.NOTIFY_EVENT_PROGRESS in options.events:
            reported_at = await running.next_report(reported_at)
            event = self._event(request, index, llm_pb2.NOTIFY_EVENT_PROGRESS, running.status)
            log.note(event, await self._dispatcher.deliver(event, _ATTEMPT, tenant))
            await asyncio.sleep(interval.total_seconds())

    def _event(
        self,
        request: internal_pb2.NotifyProgressRequest,
        index: int,
        kind: "llm_pb2.NotifyEvent.ValueType",
        status: llm_pb2.JobStatus,
    ) -> internal_pb2.NotifyRequest:
        event = internal_pb2.NotifyRequest()
        event.CopyFrom(request.event)
        event.event = kind
        event.status.MergeFrom(status)
        event.target.CopyFrom(request.targets[index])
        event.target_index = index
        if kind == llm_pb2.NOTIFY_EVENT_STARTED:
            event.status.ClearField("progress")
            event.notification_id = f"{event.status.run_id}-started-{index}"
        else:
            when = status.progress.updated_at.ToMilliseconds()
            event.notification_id = f"{event.status.run_id}-progress-{when}-{index}"
        return event


class _RunningJob:
    """The job's running attempt, as Temporal knows it."""

    def __init__(self, client: Client, request: internal_pb2.NotifyProgressRequest) -> None:
        job = request.event.status
        self._handle = client.get_workflow_handle(job.workflow_id, run_id=job.run_id)
        self._converter = client.data_converter
        self._changed = asyncio.Event()
        self.status = llm_pb2.JobStatus()
        """The last status of a running attempt. Empty before there was one."""

    async def follow(self) -> None:
        """Keep the status up to date until cancelled."""
        while True:
            try:
                await self._update()
            except (RPCError, KeysUnavailable) as error:
                _log.warning("cannot ask Temporal about %s: %s", self._handle.id, error)
            except ApplicationError as error:
                # The keys of its heartbeat were deleted: a PayloadError. The job is about to be terminated.
                _log.info("the progress of %s is unreadable: %s", self._handle.id, error)
            await asyncio.sleep(_POLL_SECONDS)

    async def started(self) -> None:
        """Return once a worker has the job."""
        while not self.status.HasField("start_time"):
            await self._wait_for_change()

    async def next_report(self, reported_at: int) -> int:
        """Wait for another report than that of `reported_at`; return its time. Times are nanoseconds since 1970."""
        # After a hand-over the new worker has not reported at first.
        while (when := self.status.progress.updated_at.ToNanoseconds()) in (0, reported_at):
            await self._wait_for_change()
        return when

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _update(self) -> None:
        run = pending_run(await self._handle.describe(rpc_timeout=RPC_TIMEOUT))
        if run is None:
            return
        status = llm_pb2.JobStatus()
        await add_run(status, run, self._converter)
        if status.state == llm_pb2.JOB_STATE_RUNNING:
            self.status = status
            self._changed.set()


class _Log:
    """The last delivery of each event to each target, kept in heartbeats for the next attempt."""

    def __init__(self, so_far: internal_pb2.NotifyProgressResponse) -> None:
        # Deliveries of a notifier of version 0.1.0 lack the target's index, so they are repeated, under the same id.
        self._by_target = {
            (item.type, item.target_index): item for item in so_far.deliveries if item.HasField("target_index")
        }

    @property
    def response(self) -> internal_pb2.NotifyProgressResponse:
        """All deliveries."""
        return internal_pb2.NotifyProgressResponse(deliveries=self._by_target.values())

    def open(self, event: internal_pb2.NotifyRequest) -> bool:
        """Return whether the event is still to be delivered."""
        known = self._by_target.get(_key(event))
        return known is None or known.state == llm_pb2.NOTIFY_STATE_PENDING

    def remaining(self, event: internal_pb2.NotifyRequest, interval: timedelta) -> float:
        """Return the seconds that are left of the interval since an event like this was last tried."""
        known = self._by_target.get(_key(event))
        if known is None or not known.attempts:
            return 0
        return (known.attempts[-1].time.ToDatetime(UTC) + interval - datetime.now(UTC)).total_seconds()

    def note(self, event: internal_pb2.NotifyRequest, response: internal_pb2.NotifyResponse) -> None:
        """Add an attempt."""
        key, id_ = _key(event), event.notification_id
        known = self._by_target.get(key)
        if known is None or known.id != id_:
            # The attempts are those of one event: a further progress event replaces the last one.
            known = llm_pb2.Delivery(id=id_, type=key[0], target=describe(event.target), target_index=key[1])
            self._by_target[key] = known
        known.target = response.target or known.target
        known.state = response.state
        if response.HasField("attempt"):
            known.attempts.append(response.attempt)
            del known.attempts[:-_KEPT_ATTEMPTS]

    def ended(self) -> internal_pb2.NotifyProgressResponse:
        """Return all deliveries, with those that are pending as failed."""
        response = self.response
        for item in response.deliveries:
            if item.state == llm_pb2.NOTIFY_STATE_PENDING:
                item.state = llm_pb2.NOTIFY_STATE_FAILED
                if not item.attempts:
                    item.attempts.add(error=to_status(DeliveryFailed("the job ended first")))
        return response


def _key(event: internal_pb2.NotifyRequest) -> tuple[str, int]:
    return event_type(event), event.target_index


@asynccontextmanager
async def _beating(log: _Log) -> AsyncIterator[None]:
    """Send heartbeats with the log to Temporal while the context is open."""

    async def beat() -> None:
        while True:
            activity.heartbeat(log.response)
            await asyncio.sleep(_POLL_SECONDS)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beating
