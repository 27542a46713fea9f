"""The steps of a deletion, as activities: see workflows.llm_deletion. Each may run again after it has succeeded."""

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC
from typing import Final

from temporalio import activity
from temporalio.client import Client, WorkflowExecution, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption
from feed.answers import Answers
from feed.feed import Feed
from jobs import names
from jobs.ids import delivery_workflow_ids, tenant_of
from llm_pb import internal_pb2, llm_pb2
from payload_converter import PayloadError
from runtime.temporal import RPC_TIMEOUT
from services.gateway.deletion.job_parts import parts_of
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.errors import JobNotFound
from services.gateway.job_reader import JobReader
from services.gateway.listing import visibility_query
from services.gateway.pipelines.reader import closed_status
from services.gateway.runs import Runs
from services.gateway.settings import GatewaySettings
from store.store import Store

_log = logging.getLogger(__name__)
_FOUND_TYPES: Final = (names.PIPELINE_WORKFLOW_TYPE, names.JOB_WORKFLOW_TYPE)
"""The types of the workflows that FindJobs finds by default. Pipelines come first: one that runs would begin further
jobs. The jobs of a pipeline are found as all others."""
DELETED_TYPES: Final = (*_FOUND_TYPES, names.BATCH_WORKFLOW_TYPE)
"""The types of the workflows that are deleted."""
_FOUND: Final = 100
"""Maximum number of jobs that FindJobs returns."""
_DESCRIBES: Final = 8
"""Maximum number of jobs that one FindJobs describes concurrently."""


class DeletionSteps:
    """The activities of LLMDeletionWorkflow, LLMBulkDeletionWorkflow and, with others, LLMUserDeletionWorkflow."""

    def __init__(
        self,
        client: Client,
        feed: Feed,
        answers: Answers,
        reader: JobReader,
        deliveries: DeliveryReader,
        settings: GatewaySettings,
        encryption: Encryption | None,
        store: Store | None,
    ) -> None:
        self._client = client
        self._reader = reader
        self._deliveries = deliveries
        self._workflow_queue = settings.workflow_queue
        self._runs = Runs(client)
        self._encryption = encryption
        self._parts = parts_of(self._runs, feed, answers, store)

    @activity.defn(name=names.ACTIVITY_STOP_JOB)
    async def stop_job(self, request: internal_pb2.StopJobRequest) -> internal_pb2.StopJobResponse:
        """Ask an open job to stop, as the request says. End the deliveries of a job that has closed.

        What is said here and below of a job holds for a pipeline and a batch as well.
        """
        open_job = await self._open(request.workflow_id, *DELETED_TYPES)
        if open_job is not None:
            await self._stop(open_job, request)
            return internal_pb2.StopJobResponse(closed=False)
        closed = True
        for id_ in delivery_workflow_ids(request.workflow_id):
            if (delivering := await self._open(id_, names.DELIVERY_WORKFLOW_TYPE)) is not None:
                closed = False
                await self._terminate(delivering)
        return internal_pb2.StopJobResponse(closed=closed)

    @activity.defn(name=names.ACTIVITY_INSPECT_JOB)
    async def inspect_job(self, workflow_id: str) -> internal_pb2.JobRemains:
        """Return the runs of a closed job, and where copies of it are."""
        remains = internal_pb2.JobRemains(workflow_id=workflow_id)
        job = await self._last(workflow_id)
        remains.cached = await _may_be_cached(job)
        delivering = [
            _of_type(await self._runs.describe(id_), names.DELIVERY_WORKFLOW_TYPE)
            for id_ in delivery_workflow_ids(workflow_id)
        ]
        for last in filter(None, (job, *delivering)):
            for run_id in sorted(await self._runs.like(last)):
                remains.runs.add(workflow_id=last.id, run_id=run_id)
        if job is None:
            # A deletion may have come before Temporal listed an earlier run.
            for run_id in sorted(await self._runs.listed(workflow_id, *DELETED_TYPES)):
                remains.runs.add(workflow_id=workflow_id, run_id=run_id)
        try:
            standing = await self._deliveries.standing(workflow_id, job)
        except (JobNotFound, PayloadError):
            if remains.runs:
                # Their workflow does not answer, or the keys of its answer were deleted.
                remains.unreached.add(place="targets")
        else:
            remains.unreached.extend(_sent(standing.state))
        return remains

    @activity.defn(name=names.ACTIVITY_KEEP_JOB_ID)
    async def keep_job_id(self, workflow_id: str) -> bool:
        """Start the tombstone under the id of a closed job; return False for a job that is open.

        A job that is past its retention has no id to keep: somebody may have submitted it again.
        """
        last = await self._last(workflow_id)
        if last is None:
            return True
        if last.status == WorkflowExecutionStatus.RUNNING:
            return False
        try:
            await self._client.start_workflow(
                names.TOMBSTONE_WORKFLOW_TYPE,
                id=workflow_id,
                task_queue=self._workflow_queue,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowAlreadyStartedError:
            return _of_type(await self._runs.describe(workflow_id), names.TOMBSTONE_WORKFLOW_TYPE) is not None
        return True

    @activity.defn(name=names.ACTIVITY_REMOVE_JOB)
    async def remove_job(self, remains: internal_pb2.JobRemains) -> internal_pb2.RemovedParts:
        """Remove what there is of a closed job, and say what is gone."""
        removed = [part.name for part in self._parts if await part.remove(remains)]
        return internal_pb2.RemovedParts(removed=removed, done=len(removed) == len(self._parts))

    @activity.defn(name=names.ACTIVITY_FIND_JOBS)
    async def find_jobs(self, request: internal_pb2.FindJobsRequest) -> internal_pb2.FindJobsResponse:
        """Return some jobs that exist and match. Temporal's visibility still shows some that are deleted."""
        before = request.before.ToDatetime(UTC).isoformat()
        # The ids tell the tenant: see below.
        hash_ = None if self._encryption is None else await self._encryption.known_search_hash(request.tenant)
        response, turns = internal_pb2.FindJobsResponse(), asyncio.Semaphore(_DESCRIBES)

        async def matches(item: WorkflowExecution) -> bool:
            async with turns:
                return tenant_of(item.id) == request.tenant and await self._matches(item, request.filters)

        for kind in request.types or _FOUND_TYPES:
            found = visibility_query(request.tenant, request.filters, hash_, kind, knows_tenants=False)
            query = f"{found} AND StartTime <= '{before}'"
            pages = self._client.list_workflows(query, page_size=_FOUND, rpc_timeout=RPC_TIMEOUT)
            while len(response.workflow_ids) < _FOUND:
                await pages.fetch_next_page()
                page = pages.current_page or ()
                for item, match in zip(page, await asyncio.gather(*map(matches, page)), strict=True):
                    if match and item.id not in response.workflow_ids and len(response.workflow_ids) < _FOUND:
                        response.workflow_ids.append(item.id)
                        if kind == names.BATCH_WORKFLOW_TYPE:
                            response.batches.append(item.id)
                if not pages.next_page_token:
                    break
        return response

    async def _matches(self, item: WorkflowExecution, filters: llm_pb2.ListRequest) -> bool:
        if (description := await self._runs.describe(item.id, item.run_id)) is None:
            return False
        if not filters.states:
            return True
        # What has run again under its id is in the state of the last run.
        description = _of_type(await self._runs.describe(item.id), *DELETED_TYPES) or description
        if description.workflow_type == names.PIPELINE_WORKFLOW_TYPE:
            return (await closed_status(description)).state in filters.states
        return (await self._reader.readable_status(description)).state in filters.states

    async def _last(self, id_: str) -> WorkflowExecutionDescription | None:
        """Return the last run of the job, pipeline or batch of an id; None without one. See Runs.last."""
        return _of_type(await self._runs.last(id_, *DELETED_TYPES), *DELETED_TYPES)

    async def _open(self, id_: str, *kinds: str) -> WorkflowExecutionDescription | None:
        """Return the running workflow of one of the types under an id."""
        last = _of_type(await self._runs.describe(id_), *kinds)
        return last if last is not None and last.status == WorkflowExecutionStatus.RUNNING else None

    async def _stop(self, job: WorkflowExecution, request: internal_pb2.StopJobRequest) -> None:
        if request.method == internal_pb2.STOP_JOB_METHOD_TERMINATE:
            await self._terminate(job)
        elif request.method == internal_pb2.STOP_JOB_METHOD_CANCEL:
            handle = self._client.get_workflow_handle(job.id, run_id=job.run_id)
            cancel = llm_pb2.CancelRequest(workflow_id=job.id, reason=names.REASON_DELETION)
            try:
                await handle.signal(names.SIGNAL_CANCEL, cancel, rpc_timeout=RPC_TIMEOUT)
            except RPCError as error:
                _require_closed(error)

    async def _terminate(self, execution: WorkflowExecution) -> None:
        handle = self._client.get_workflow_handle(execution.id, run_id=execution.run_id)
        try:
            await handle.terminate(reason=names.REASON_DELETION, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            _require_closed(error)
        _log.info("terminated for a deletion", extra={"workflow_id": execution.id, "run_id": execution.run_id})


def _of_type(last: WorkflowExecutionDescription | None, *kinds: str) -> WorkflowExecutionDescription | None:
    return last if last is not None and last.workflow_type in kinds else None


async def _may_be_cached(job: WorkflowExecutionDescription | None) -> bool:
    """Return whether the answer of a job may be in the cache. One whose keys were deleted can be read by nobody."""
    try:
        return job is not None and await job.memo_value(names.MEMO_CACHE, None) is True
    except PayloadError:
        return False


def _require_closed(error: RPCError) -> None:
    """Raise the error unless it says that the workflow has closed meanwhile."""
    if error.status != RPCStatusCode.NOT_FOUND:
        raise error


def _sent(state: internal_pb2.DeliveryState) -> Iterator[llm_pb2.UnreachedCopy]:
    """Yield what was sent, or may have been: an attempt that failed may have reached its receiver nevertheless."""
    for delivery in (*state.deliveries, *state.earlier):
        under_way = delivery.state == llm_pb2.NOTIFY_STATE_PENDING and not delivery.HasField("next_attempt_time")
        if delivery.attempts or under_way or delivery.state == llm_pb2.NOTIFY_STATE_DELIVERED:
            copy = llm_pb2.UnreachedCopy(place=delivery.target, type=delivery.type)
            if delivery.attempts:
                copy.time.CopyFrom(delivery.attempts[-1].time)
            yield copy
