"""Reads a job from Temporal and returns it as the API describes it.

One DescribeWorkflowExecution returns almost everything. Of an open job it has the pending activity, whether a worker
runs it, the number of its attempt and its last heartbeat. Of a closed job it has the final status, which the workflow
has written into its memo. The result of a closed job is in the event that closed it.

The workflow itself is asked for the rest, by the query GetStatus: the deliveries of an open job, the attempts before a
hand-over, and the partial output of a job that was cancelled or used up its total time. Temporal's closing event has no
room for that output. A job that Temporal has ended before its workflow could settle the outcome has left its output on
the live feed.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from feed.feed import Feed
from jobs import errors, names
from jobs.application_errors import from_application_error, partial_result
from jobs.errors import EngineFailed, to_status
from jobs.ids import tenant_of
from jobs.outcome import add_result
from jobs.pending import add_run, pending_run
from llm_pb import llm_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from runtime.shared_calls import SharedCalls
from runtime.temporal import RPC_TIMEOUT
from services.gateway.access import require_own
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.errors import JobDeleted, not_found
from services.gateway.job_record import (
    CLOSED_STATES,
    FINAL_STATES,
    FIRST_RUN_EVENTS,
    add_memo_cost,
    bare_status,
    base_status,
    expected_result_bytes,
    final_status,
    set_times,
    user_of,
)
from services.gateway.left_output import left_output
from services.gateway.models.catalogue import Models
from services.gateway.runs import describe_twice

_log = logging.getLogger(__name__)
_TASK_STARTED_EVENTS: Final = 4
"""Maximum number of events of a workflow that has not scheduled its activity yet."""
_EARLIER_TIMEOUT: Final = timedelta(seconds=2)
"""Maximum wait for a workflow's answer about earlier attempts. Without it the status is less complete, not wrong."""
_LARGE_BYTES: Final = 256 * 1024
_LARGE_READS: Final = 8
"""Maximum number of large results that all calls read concurrently: each is in memory several times meanwhile."""


class Ending(NamedTuple):
    """What the event that closed a workflow holds."""

    result: llm_pb2.JobResult | None
    """Partial after a failure. None where the event has no room for a result."""
    failure: ApplicationError | None


class JobReader:
    """Reads jobs from Temporal."""

    def __init__(self, client: Client, models: Models, deliveries: DeliveryReader, feed: Feed) -> None:
        self._client = client
        self._models = models
        self._deliveries = deliveries
        self._feed = feed
        self._large_reads = asyncio.Semaphore(_LARGE_READS)
        self._shared = SharedCalls()

    async def get(self, caller: Caller, workflow_id: str) -> llm_pb2.GetStatusResponse:
        """Return the job's status, and its result once that is settled. Concurrent calls share the answer.

        Raises ApiError NOT_FOUND for a job that does not exist or that the caller may not see; RPCError when
        Temporal or the workflow worker is unavailable.
        """
        return await self.status_of(await self.describe(caller, workflow_id))

    async def status_of(
        self, description: WorkflowExecutionDescription, ending: Ending | None = None
    ) -> llm_pb2.GetStatusResponse:
        """Return what get() does, for a job that was just described. `ending` is how it ended, where that is known.

        Calls with the same description share the answer, so it must not be changed.
        """
        # The key is of this very description: one that is equal may have been made earlier.
        return await self._shared.joined(id(description), lambda: self._status_of(description, ending))

    async def readable_status(self, description: WorkflowExecutionDescription) -> llm_pb2.JobStatus:
        """Return a copy of the job's status, or as much of it as is readable after its keys were deleted."""
        status = llm_pb2.JobStatus()
        try:
            status.CopyFrom((await self.status_of(description)).status)
        except PayloadError:
            status = bare_status(description)
        return status

    async def _status_of(
        self, description: WorkflowExecutionDescription, ending: Ending | None
    ) -> llm_pb2.GetStatusResponse:
        large = await expected_result_bytes(description) > _LARGE_BYTES
        async with self._large_reads if large else contextlib.nullcontext():
            if description.status == WorkflowExecutionStatus.RUNNING:
                return await self._open(description)
            return await self._closed(description, ending)

    async def describe(
        self, caller: Caller, workflow_id: str, run_id: str | None = None, *, once: bool = False
    ) -> WorkflowExecutionDescription:
        """Return Temporal's description of the job's workflow, of its last run unless one is named. Raises like get().

        With `once` Temporal is asked only once, which is not enough for a workflow that may have started a moment ago.
        Temporal is not asked about an id of another tenant.
        Concurrent calls share a description that is not older than the calls.
        """
        require_own(caller, workflow_id)

        async def describe() -> WorkflowExecutionDescription:
            handle = self._client.get_workflow_handle(workflow_id, run_id=run_id)
            return await (handle.describe(rpc_timeout=RPC_TIMEOUT) if once else describe_twice(handle))

        try:
            description = await self._shared.fresh((workflow_id, run_id, once), describe)
        except RPCError as error:
            if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                raise not_found(workflow_id) from error
            raise
        if description.workflow_type == names.TOMBSTONE_WORKFLOW_TYPE:
            raise not_found(workflow_id, JobDeleted)
        if description.workflow_type != names.JOB_WORKFLOW_TYPE:
            raise not_found(workflow_id)
        # Only whose credential is bound to a user needs the keys of a hashed job.
        if caller.user_id and not caller.may_see(await user_of(description)):
            raise not_found(workflow_id)
        return description

    def handle(self, workflow_id: str) -> WorkflowHandle[Any, Any]:
        """Return Temporal's handle of the last run of a workflow. Makes no call."""
        return self._client.get_workflow_handle(workflow_id)

    async def ending(self, workflow_id: str, run_id: str, *, rpc_timeout: timedelta | None = None) -> Ending:
        """Wait until the job has ended, and return what the event that closed its workflow holds. Raises RPCError.

        Waits by one long poll after another, unless there is an `rpc_timeout`.
        """
        handle = self._client.get_workflow_handle(workflow_id, run_id=run_id, result_type=llm_pb2.JobResult)
        try:
            return Ending(await handle.result(follow_runs=False, rpc_timeout=rpc_timeout), None)
        except WorkflowFailureError as error:
            failure = error.cause
        if not isinstance(failure, ApplicationError):
            return Ending(None, None)
        return Ending(partial_result(failure), failure)

    async def _open(self, description: WorkflowExecutionDescription) -> llm_pb2.GetStatusResponse:
        status = await base_status(description)
        run = pending_run(description)
        attempts: Sequence[llm_pb2.JobAttempt] = ()
        if run is not None:
            if description.history_length > FIRST_RUN_EVENTS:
                # Temporal does not distinguish a first RunLLMOnGPU from one after a hand-over.
                attempts = await self._add_earlier(status, description)
            attempts = await self._add_run(status, run, attempts)
        elif description.history_length > _TASK_STARTED_EVENTS:
            response = await self._settled(description)
            if response is not None:
                return response
            # An attempt has just ended, and the workflow has not continued yet.
            status.state = llm_pb2.JOB_STATE_RUNNING
        else:
            status.state = llm_pb2.JOB_STATE_QUEUED
        return llm_pb2.GetStatusResponse(status=status, attempts=attempts)

    async def _settled(self, description: WorkflowExecutionDescription) -> llm_pb2.GetStatusResponse | None:
        """Return the workflow's own answer once its outcome is settled, None before."""
        try:
            response = await self._ask_workflow(description)
        except RPCError:
            if description.raw_description.HasField("pending_workflow_task"):
                # No worker runs workflows now, so the workflow itself does not know the last events.
                return None
            raise
        if response.status.state in (llm_pb2.JOB_STATE_QUEUED, llm_pb2.JOB_STATE_RUNNING):
            return None
        # Final only once Temporal has closed the workflow.
        response.status.state = llm_pb2.JOB_STATE_NOTIFYING
        return response

    async def _add_earlier(
        self, status: llm_pb2.JobStatus, description: WorkflowExecutionDescription
    ) -> Sequence[llm_pb2.JobAttempt]:
        """Add to the status what the workflow soon answers about attempts before a hand-over; return those."""
        try:
            answer = await self._query(description, _EARLIER_TIMEOUT)
        except (WorkflowQueryFailedError, RPCError) as error:
            _log.info("%s does not report its earlier attempts: %s", description.id, error)
            return ()
        earlier = answer.status
        if earlier.state != llm_pb2.JOB_STATE_QUEUED:
            return ()
        status.attempt = earlier.attempt
        for field in ("error", "start_time", "first_token_time", "progress"):
            if earlier.HasField(field):
                getattr(status, field).CopyFrom(getattr(earlier, field))
        return answer.result.attempts

    async def _add_run(
        self, status: llm_pb2.JobStatus, run: PendingActivityInfo, earlier: Sequence[llm_pb2.JobAttempt]
    ) -> Sequence[llm_pb2.JobAttempt]:
        attempts = await add_run(status, run, self._client.data_converter, earlier)
        if status.state == llm_pb2.JOB_STATE_QUEUED and not status.progress.worker:
            info = await self._models.queue_info(self._client, run.activity_options.task_queue.name)
            if info is not None:
                status.queue.CopyFrom(info)
        return attempts

    async def _ask_workflow(self, description: WorkflowExecutionDescription) -> llm_pb2.GetStatusResponse:
        """Return the workflow's own answer or, when it cannot answer, what its record holds.

        Raises RPCError when Temporal or the workflow worker is unavailable.
        """
        try:
            response = await self._query(description, RPC_TIMEOUT)
        except (WorkflowQueryFailedError, RPCError) as error:
            if isinstance(error, RPCError) and error.status != RPCStatusCode.FAILED_PRECONDITION:
                raise
            # FAILED_PRECONDITION: the workflow has not completed its first step, or fails at the next one.
            _log.warning("%s does not answer: its code or its input is at fault: %s", description.id, error)
            response = llm_pb2.GetStatusResponse(status=await base_status(description))
            if description.status == WorkflowExecutionStatus.FAILED:
                response.status.error.CopyFrom(to_status(await self._failure(description)))
        return response

    async def _query(
        self, description: WorkflowExecutionDescription, rpc_timeout: timedelta
    ) -> llm_pb2.GetStatusResponse:
        handle = self._client.get_workflow_handle(description.id, run_id=description.run_id)
        response: llm_pb2.GetStatusResponse = await handle.query(
            names.QUERY_GET_STATUS, result_type=llm_pb2.GetStatusResponse, rpc_timeout=rpc_timeout
        )
        return response

    async def _failure(self, description: WorkflowExecutionDescription) -> errors.JobError:
        ending = await self.ending(description.id, description.run_id, rpc_timeout=RPC_TIMEOUT)
        if ending.failure is None:
            return EngineFailed("the workflow failed")
        return from_application_error(ending.failure, otherwise=EngineFailed)

    async def _recorded(
        self, description: WorkflowExecutionDescription, ending: Ending | None
    ) -> llm_pb2.GetStatusResponse | None:
        """Return the status that a closed workflow wrote into its memo, and its result; None when it wrote none."""
        status = await final_status(description)
        if status is None:
            return None
        if description.status not in (WorkflowExecutionStatus.COMPLETED, WorkflowExecutionStatus.FAILED):
            # The event that closed it has no room for the result.
            response = await self._ask_workflow(description)
            response.status.CopyFrom(status)
            return response
        if ending is None:
            ending = await self.ending(description.id, description.run_id, rpc_timeout=RPC_TIMEOUT)
        return llm_pb2.GetStatusResponse(status=status, result=ending.result)

    async def _closed(
        self, description: WorkflowExecutionDescription, ending: Ending | None
    ) -> llm_pb2.GetStatusResponse:
        response = await self._recorded(description, ending) or await self._ask_workflow(description)
        status = response.status
        await self._deliveries.refresh(status.workflow_id, status.run_id, status.notifications)
        await set_times(status, description)
        settled = status.state in FINAL_STATES or status.state == llm_pb2.JOB_STATE_NOTIFYING
        if description.status is not None and status.state not in FINAL_STATES:
            status.state = CLOSED_STATES[description.status]
        if not settled:
            await self._add_left_output(response, description)
        if description.status == WorkflowExecutionStatus.TERMINATED:
            status.state = llm_pb2.JOB_STATE_CANCELLED
            status.error.CopyFrom(to_status(errors.Terminated("the workflow was terminated by an operator")))
        if description.status == WorkflowExecutionStatus.TIMED_OUT and not status.HasField("error"):
            status.error.CopyFrom(to_status(errors.TotalTimeout("the job's total time was spent")))
        return response

    async def _add_left_output(
        self, response: llm_pb2.GetStatusResponse, description: WorkflowExecutionDescription
    ) -> None:
        """Add to the response what the live feed still holds of a job that Temporal ended before its outcome."""
        if description.status not in (WorkflowExecutionStatus.TERMINATED, WorkflowExecutionStatus.TIMED_OUT):
            return
        result = await left_output(self._feed.of_tenant(tenant_of(description.id)), description.run_id)
        if result is None:
            return
        await add_memo_cost(result.metadata, description)
        result.metadata.model = description.typed_search_attributes.get(names.MODEL) or ""
        if description.status == WorkflowExecutionStatus.TERMINATED:
            result.finish_reason = llm_pb2.FINISH_REASON_CANCELLED
        response.result.CopyFrom(result)
        add_result(response.status, result, response.status.state)
