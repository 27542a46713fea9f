"""Submit and Cancel: start and cancel jobs by calls to Temporal."""

import logging
from contextlib import suppress
from functools import partial

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names, options
from jobs.field_rules import Violation, too_large
from jobs.ids import trace_id, unshortened_workflow_id, workflow_id
from jobs.rules import check_job
from jobs.start import digests, job_start
from llm_pb import internal_pb2, llm_pb2
from runtime.telemetry import current_traceparent
from runtime.temporal import RPC_TIMEOUT
from runtime.tracebacks import forget_frames
from services.gateway.errors import JobNotFound, key_reused
from services.gateway.job_reader import JobReader
from services.gateway.job_record import FINAL_STATES
from services.gateway.job_traces import link_call
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import Models
from services.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)


class JobSubmission:
    """Starts and cancels jobs."""

    def __init__(
        self, client: Client, models: Models, reader: JobReader, settings: GatewaySettings, metrics: GatewayMetrics
    ) -> None:
        self._client = client
        self._models = models
        self._reader = reader
        self._settings = settings
        self._metrics = metrics

    async def check_bounds(self, request: llm_pb2.SubmitRequest) -> list[Violation]:
        """Return the violations of the operator's settings. Raises ApiError RESOURCE_EXHAUSTED like Models.check."""
        job, settings = request.job, self._settings
        if job.ByteSize() > settings.max_job_bytes:
            # The other checks would take too long.
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

    async def submit(self, request: llm_pb2.SubmitRequest) -> llm_pb2.SubmitResponse:
        """Start the job, or return the equal job that was started under its key. The job has passed all checks.

        Raises ApiError ALREADY_EXISTS for a key that belongs to another job; RPCError when Temporal is unavailable.
        """
        job, traceparent, now = request.job, current_traceparent(), Timestamp()
        now.GetCurrentTime()
        start = job_start(job, self._options(job), traceparent=traceparent, create_time=now)
        if (earlier := unshortened_workflow_id(job.user_id, job.request_id)) != start.id:
            # The job may still run under the id of a version that did not shorten ids.
            with suppress(JobNotFound):
                return await self._found(earlier, job, None)
        try:
            handle = await self._client.start_workflow(
                names.JOB_WORKFLOW_TYPE,
                job,
                id=start.id,
                task_queue=self._settings.workflow_queue,
                execution_timeout=start.execution_timeout,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=start.memo,
                search_attributes=start.search_attributes,
                priority=start.priority,
                request_eager_start=True,
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowAlreadyStartedError as error:
            forget_frames(error)
            return await self._found(start.id, job, error)
        # The name is one of the catalogue: any other was refused.
        self._metrics.submitted.add(1, {"gen_ai.request.model": job.model})
        run_id = handle.first_execution_run_id or ""
        status = llm_pb2.JobStatus(
            workflow_id=start.id,
            run_id=run_id,
            state=llm_pb2.JOB_STATE_QUEUED,
            trace_id=trace_id(traceparent),
            create_time=now,
        )
        _log.info("job accepted", extra={"workflow_id": start.id, "run_id": run_id, "model": job.model})
        return llm_pb2.SubmitResponse(workflow_id=start.id, run_id=run_id, status=status)

    async def find_accepted(self, request: llm_pb2.SubmitRequest) -> llm_pb2.SubmitResponse | None:
        """Return the job under the request's key if it equals the request's job; None if not.

        The method is for a request that breaks the rules or bounds: an older gateway, or one with other settings, may
        have accepted the job. Raises RPCError when Temporal is unavailable.
        """
        job = request.job
        if check_job(job, strict=False):
            # No version has ever accepted such a job, so Temporal need not be asked.
            return None
        ids = (workflow_id(job.user_id, job.request_id), unshortened_workflow_id(job.user_id, job.request_id))
        for id_ in dict.fromkeys(ids):
            with suppress(JobNotFound):
                description = await self._reader.describe(id_, once=True)
                if await _is_of(description, job):
                    return await self._as_submitted(description)
        return None

    async def cancel(self, request: llm_pb2.CancelRequest) -> llm_pb2.CancelResponse:
        """Cancel the job and return its status; an ended job does not change. Raises ApiError NOT_FOUND, RPCError."""
        description = await self._reader.describe(request.workflow_id)
        await link_call(description)
        if description.status != WorkflowExecutionStatus.RUNNING:
            return llm_pb2.CancelResponse(status=(await self._reader.status_of(description)).status)
        handle = self._client.get_workflow_handle(request.workflow_id)
        signal = partial(handle.signal, names.SIGNAL_CANCEL, request, rpc_timeout=RPC_TIMEOUT)
        signalled = True
        try:
            await signal()
        except RPCError as error:
            # Temporal answers NOT_FOUND for a workflow that has ended, too, and sometimes wrongly: see JobReader.
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            signalled = False
        _log.info("cancel asked for", extra={"workflow_id": request.workflow_id})
        status = llm_pb2.JobStatus()
        status.CopyFrom((await self._reader.get(request.workflow_id)).status)
        if status.state not in FINAL_STATES:
            if not signalled:
                await signal()
            status.cancel_requested = True
        return llm_pb2.CancelResponse(status=status)

    async def _found(
        self,
        id_: str,
        job: llm_pb2.JobRequest,
        error: WorkflowAlreadyStartedError | None,
    ) -> llm_pb2.SubmitResponse:
        description = await self._reader.describe(id_)
        if not await _is_of(description, job):
            await link_call(description)
            raise key_reused(job.user_id, job.request_id) from error
        return await self._as_submitted(description)

    async def _as_submitted(self, description: WorkflowExecutionDescription) -> llm_pb2.SubmitResponse:
        await link_call(description)
        status = (await self._reader.status_of(description)).status
        return llm_pb2.SubmitResponse(workflow_id=description.id, run_id=status.run_id, status=status)

    def _options(self, job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
        settings, span = self._settings, options.duration
        model = self._models.get(job.model)
        return internal_pb2.JobOptions(
            gpu_task_queue=model.queue if model else names.GPU_QUEUE,
            notify_task_queue=settings.notify_queue,
            timeouts=llm_pb2.JobTimeouts(
                total=span(settings.total_timeout),
                queue=span(settings.queue_timeout),
                run=span(settings.run_timeout),
            ),
            heartbeat_timeout=span(settings.heartbeat_timeout),
            gpu_retry=internal_pb2.RetryOptions(
                initial_interval=span(settings.retry_interval),
                backoff_coefficient=settings.retry_backoff,
                maximum_attempts=settings.retry_attempts,
            ),
            notify_retry=internal_pb2.RetryOptions(
                initial_interval=span(settings.notify_interval),
                backoff_coefficient=settings.notify_backoff,
                maximum_interval=span(settings.notify_max_interval),
                maximum_attempts=settings.notify_attempts,
                within=span(settings.notify_max_duration),
            ),
            notify_timeout=span(settings.notify_timeout),
            notify_hold=span(settings.notify_hold),
            default_max_tokens=model.default_max_tokens if model else 0,
            notify_operator=settings.notify_operator,
        )


async def _is_of(description: WorkflowExecutionDescription, job: llm_pb2.JobRequest) -> bool:
    """Return whether the workflow belongs to an equal job.

    A job of an older gateway has only the digest of its bytes. They are its normal form when the client set no default
    explicitly.
    """
    expected = digests(job)
    return bool({await description.memo_value(key, None) for key in expected} & {*expected.values()})
