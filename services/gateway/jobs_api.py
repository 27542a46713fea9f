"""Submit, Cancel and List: what the API does to jobs, as calls to Temporal."""

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Final

from temporalio.client import Client, WorkflowExecution, WorkflowExecutionDescription
from temporalio.common import Priority, TypedSearchAttributes, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names, options
from jobs.equality import same_job_digest
from jobs.field_rules import Violation, too_large
from jobs.ids import ID_PATTERN, job_digest, trace_id, unshortened_workflow_id, workflow_id
from jobs.memo import to_memo
from jobs.search import attributes_of
from jobs.times import execution_timeout
from llm_pb import llm_pb2
from runtime.telemetry import current_traceparent
from runtime.temporal import RPC_TIMEOUT
from runtime.tracebacks import forget_frames
from services.gateway.errors import ApiError, JobNotFound, invalid, key_reused, temporal_unavailable
from services.gateway.job_reader import JobReader
from services.gateway.job_record import FINAL_STATES, base_status, final_status
from services.gateway.job_traces import link_call
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import Models
from services.gateway.page_token import REFUSED, PageTokens
from services.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)
_DEFAULT_PAGE_SIZE: Final = 20
_MAX_FAIRNESS_KEY: Final = 64
"""Bytes that Temporal takes of a fairness key."""
_DESCRIBES: Final = 32
"""Jobs that List describes at once, whatever number of pages is asked for."""
_SHARE_OF_VISIBILITY: Final = 0.5
"""Of the time that List has: the rest is for describing jobs of the page, above all the open ones."""

_STATE_QUERIES: Final = {
    llm_pb2.JOB_STATE_QUEUED: "ExecutionStatus = 'Running'",
    llm_pb2.JOB_STATE_RUNNING: "ExecutionStatus = 'Running'",
    llm_pb2.JOB_STATE_NOTIFYING: "ExecutionStatus = 'Running'",
    llm_pb2.JOB_STATE_SUCCEEDED: "ExecutionStatus = 'Completed'",
    # Without JobState: its input could not be read.
    llm_pb2.JOB_STATE_FAILED: (
        "(ExecutionStatus = 'Failed' AND (JobState IS NULL OR JobState != 'JOB_STATE_TIMED_OUT'))"
    ),
    llm_pb2.JOB_STATE_CANCELLED: "ExecutionStatus IN ('Canceled', 'Terminated')",
    llm_pb2.JOB_STATE_TIMED_OUT: "(ExecutionStatus = 'TimedOut' OR JobState = 'JOB_STATE_TIMED_OUT')",
}


class Jobs:
    """Starts, cancels and lists jobs."""

    def __init__(
        self,
        client: Client,
        models: Models,
        reader: JobReader,
        page_tokens: PageTokens,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
    ) -> None:
        self._metrics = metrics
        self._page_tokens = page_tokens
        self._describes = asyncio.Semaphore(_DESCRIBES)
        self._client = client
        self._models = models
        self._reader = reader
        self._settings = settings

    async def submit(self, request: llm_pb2.SubmitRequest) -> llm_pb2.SubmitResponse:
        """Start the job, or find the equal one already started under its key. It has passed the rules and bounds.

        Raises ApiError ALREADY_EXISTS for a key that belongs to another job; RPCError when Temporal is away.
        """
        job = request.job
        id_ = workflow_id(job.user_id, job.request_id)
        digests = _digests(job)
        if (earlier := unshortened_workflow_id(job.user_id, job.request_id)) != id_:
            # Started by a version that did not shorten ids, it may run still.
            with suppress(JobNotFound):
                return await self._found(earlier, digests, job, None)
        chosen = self._options(job)
        memo = {names.MEMO_OPTIONS: to_memo(chosen), **digests}
        if traceparent := current_traceparent():
            memo[names.MEMO_TRACEPARENT] = traceparent
        try:
            handle = await self._client.start_workflow(
                names.WORKFLOW_TYPE,
                job,
                id=id_,
                task_queue=self._settings.workflow_queue,
                execution_timeout=execution_timeout(options.complete(chosen, job).timeouts.total.ToTimedelta()),
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=memo,
                search_attributes=TypedSearchAttributes(attributes_of(job)),
                # Not the job's priority, which is of its turn at the GPU alone: see workflows.llm_job.
                priority=Priority(fairness_key=_fairness_key(job.user_id)),
                request_eager_start=True,
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowAlreadyStartedError as error:
            forget_frames(error)
            return await self._found(id_, digests, job, error)
        # A model of the catalogue: any other name was refused.
        self._metrics.submitted.add(1, {"gen_ai.request.model": job.model})
        run_id = handle.first_execution_run_id or ""
        status = llm_pb2.JobStatus(
            workflow_id=id_, run_id=run_id, state=llm_pb2.JOB_STATE_QUEUED, trace_id=trace_id(traceparent)
        )
        status.create_time.GetCurrentTime()
        _log.info("job accepted", extra={"workflow_id": id_, "run_id": run_id, "model": job.model})
        return llm_pb2.SubmitResponse(workflow_id=id_, run_id=run_id, status=status)

    async def find_accepted(self, request: llm_pb2.SubmitRequest) -> llm_pb2.SubmitResponse | None:
        """Return the job under the request's key if it is the request's own; None if not.

        For a request that breaks today's rules or bounds: an older gateway, or one with other settings, may have
        accepted the job. Raises RPCError when Temporal is away.
        """
        job = request.job
        if ID_PATTERN.fullmatch(job.user_id) is None or ID_PATTERN.fullmatch(job.request_id) is None:
            return None
        ids = (workflow_id(job.user_id, job.request_id), unshortened_workflow_id(job.user_id, job.request_id))
        for id_ in dict.fromkeys(ids):
            with suppress(JobNotFound):
                description = await self._reader.describe(id_, once=True)
                if await _is_of(description, _digests(job)):
                    return await self._as_submitted(description)
        return None

    async def _found(
        self,
        id_: str,
        digests: Mapping[str, str],
        job: llm_pb2.JobRequest,
        error: WorkflowAlreadyStartedError | None,
    ) -> llm_pb2.SubmitResponse:
        description = await self._reader.describe(id_)
        if not await _is_of(description, digests):
            await link_call(description)
            raise key_reused(job.user_id, job.request_id) from error
        return await self._as_submitted(description)

    async def _as_submitted(self, description: WorkflowExecutionDescription) -> llm_pb2.SubmitResponse:
        await link_call(description)
        status = (await self._reader.look(description)).status
        return llm_pb2.SubmitResponse(workflow_id=description.id, run_id=status.run_id, status=status)

    async def cancel(self, request: llm_pb2.CancelRequest) -> llm_pb2.CancelResponse:
        """Ask the job to stop; on a job that has ended, return how. Raises ApiError NOT_FOUND, RPCError."""
        await link_call(await self._reader.describe(request.workflow_id))
        handle = self._client.get_workflow_handle(request.workflow_id)
        signal = partial(handle.signal, names.SIGNAL_CANCEL, request, rpc_timeout=RPC_TIMEOUT)
        signalled = True
        try:
            await signal()
        except RPCError as error:
            # Temporal says NOT_FOUND for a workflow that has ended, too; and without reason: see JobReader.
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            signalled = False
        _log.info("cancel asked for", extra={"workflow_id": request.workflow_id})
        status = (await self._reader.read(request.workflow_id)).status
        if status.state not in FINAL_STATES:
            if not signalled:
                await signal()
            status.cancel_requested = True
        return llm_pb2.CancelResponse(status=status)

    async def list_page(self, request: llm_pb2.ListRequest) -> llm_pb2.ListResponse:
        """Return a page of jobs.

        Raises ApiError INVALID_ARGUMENT for a page_token that Temporal refuses, UNAVAILABLE when it does not answer in
        time; RPCError.
        """
        began, within = asyncio.get_running_loop().time(), self._settings.list_timeout.total_seconds()
        token = self._page_tokens.unseal(request)
        page = self._client.list_workflows(
            _query(request), page_size=request.page_size or _DEFAULT_PAGE_SIZE, next_page_token=token
        )
        try:
            async with asyncio.timeout_at(began + within * _SHARE_OF_VISIBILITY):
                await page.fetch_next_page()
        except TimeoutError as error:
            raise temporal_unavailable("Temporal did not list the jobs in time; call again") from error
        except RPCError as error:
            # A token of an older Temporal's, say: its SQL store answers UNKNOWN to one that it cannot read.
            if token is not None and error.status in (RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.UNKNOWN):
                raise invalid([REFUSED]) from error
            raise
        summaries = await asyncio.gather(*(self._summary(item, began + within) for item in page.current_page or ()))
        jobs = [job for job in summaries if not request.states or job.status.state in request.states]
        return llm_pb2.ListResponse(jobs=jobs, next_page_token=self._page_tokens.seal(request, page.next_page_token))

    async def _summary(self, execution: WorkflowExecution, until: float) -> llm_pb2.JobSummary:
        # Without one it is open, or Temporal has ended it before it could leave one.
        status = await final_status(execution) or await self._look_up(execution, until)
        status.ClearField("progress")
        status.ClearField("notifications")
        attributes = execution.typed_search_attributes
        return llm_pb2.JobSummary(
            status=status,
            user_id=attributes.get(names.USER_ID) or "",
            request_id=attributes.get(names.REQUEST_ID) or "",
            model=attributes.get(names.MODEL) or "",
            project_id=attributes.get(names.PROJECT_ID) or "",
        )

    async def _look_up(self, execution: WorkflowExecution, until: float) -> llm_pb2.JobStatus:
        """Return the status that GetStatus returns; what the list alone tells when that cannot be had in time."""
        try:
            async with asyncio.timeout_at(until), self._describes:
                return (await self._reader.look(await self._reader.describe(execution.id, execution.run_id))).status
        except (ApiError, RPCError, TimeoutError) as error:
            # Past its retention since it was listed; or nobody runs workflows now, which must not cost the whole page.
            _log.info("%s cannot be looked at: %r", execution.id, error)
            return await base_status(execution)

    async def check_bounds(self, request: llm_pb2.SubmitRequest) -> list[Violation]:
        """Return what the operator's models and bounds forbid. Raises ApiError RESOURCE_EXHAUSTED like Models.check."""
        job, settings = request.job, self._settings
        if job.ByteSize() > settings.max_job_bytes:
            # Nothing else is worth the time.
            return [Violation("job", too_large(job.ByteSize(), settings.max_job_bytes))]
        violations = await self._models.check(job)
        if 1 <= job.priority < settings.highest_priority:
            rule = f"must be {settings.highest_priority} (first) to 5 (last) here, or 0 for the default"
            violations.append(Violation("job.priority", rule))
        most = {
            "total": settings.max_total_timeout,
            "queue": settings.max_queue_timeout,
            "run": settings.max_run_timeout,
        }
        for name, limit in most.items():
            asked = getattr(job.timeouts, name)
            if asked.seconds + asked.nanos / 1e9 > limit.total_seconds():
                violations.append(Violation(f"job.timeouts.{name}", f"must be at most {limit}"))
        return violations

    def _options(self, job: llm_pb2.JobRequest) -> llm_pb2.JobOptions:
        settings, span = self._settings, options.duration
        model = self._models.get(job.model)

        return llm_pb2.JobOptions(
            gpu_task_queue=model.queue if model else names.GPU_QUEUE,
            notify_task_queue=settings.notify_queue,
            timeouts=llm_pb2.JobTimeouts(
                total=span(settings.total_timeout),
                queue=span(settings.queue_timeout),
                run=span(settings.run_timeout),
            ),
            heartbeat_timeout=span(settings.heartbeat_timeout),
            gpu_retry=llm_pb2.RetryOptions(
                initial_interval=span(settings.retry_interval),
                backoff_coefficient=settings.retry_backoff,
                maximum_attempts=settings.retry_attempts,
            ),
            notify_retry=llm_pb2.RetryOptions(
                initial_interval=span(settings.notify_interval),
                backoff_coefficient=settings.notify_backoff,
                maximum_interval=span(settings.notify_max_interval),
                maximum_attempts=settings.notify_attempts,
                within=span(settings.notify_within),
            ),
            notify_timeout=span(settings.notify_timeout),
            notify_hold=span(settings.notify_hold),
            default_max_tokens=model.default_max_tokens if model else 0,
        )


def _digests(job: llm_pb2.JobRequest) -> dict[str, str]:
    return {names.MEMO_DIGEST: job_digest(job), names.MEMO_SAME_JOB_DIGEST: same_job_digest(job)}


async def _is_of(description: WorkflowExecutionDescription, digests: Mapping[str, str]) -> bool:
    """Return whether the workflow is of the job with these digests.

    A job of an older gateway has the digest of its bytes alone, which are its normal form where it left out all
    defaults.
    """
    return bool({await description.memo_value(key, None) for key in digests} & {*digests.values()})


def _fairness_key(user_id: str) -> str:
    if len(user_id) <= _MAX_FAIRNESS_KEY:
        return user_id
    return hashlib.sha256(user_id.encode()).hexdigest()[:_MAX_FAIRNESS_KEY]


def _query(request: llm_pb2.ListRequest) -> str:
    """Return the visibility query; every value has passed a rule that keeps quotes out."""
    terms = [f"WorkflowType = '{names.WORKFLOW_TYPE}'"]
    for key, value in (
        (names.USER_ID, request.user_id),
        (names.MODEL, request.model),
        (names.PROJECT_ID, request.project_id),
    ):
        if value:
            terms.append(f"{key.name} = '{value}'")
    if request.states:
        terms.append(f"({' OR '.join(sorted({_STATE_QUERIES[state] for state in request.states}))})")
    return " AND ".join(terms)
