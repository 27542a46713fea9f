"""Submit: starts a job by a call to Temporal, or finds the one that was started before."""

import logging
from contextlib import suppress

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.client import WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError

from encryption import Encryption
from jobs import names
from jobs.classes import class_of, label_of
from jobs.costs import reserved_tokens
from jobs.ids import trace_id, unshortened_workflow_id, workflow_id
from jobs.rules import check_job
from jobs.search import Hash
from jobs.start import digests, job_start
from llm_pb import llm_pb2
from runtime import audit
from runtime.auth import Caller
from runtime.telemetry import current_traceparent
from runtime.tracebacks import forget_frames
from services.gateway.effects import Effects
from services.gateway.errors import JobDeleted, JobNotFound, key_reused, work_deleted
from services.gateway.job_options import job_options
from services.gateway.job_reader import JobReader
from services.gateway.job_record import UNSETTLED_STATES
from services.gateway.job_traces import link_call
from services.gateway.metrics import GatewayMetrics
from services.gateway.models.catalogue import Models
from services.gateway.quotas.admission import OpenJobQuotas
from services.gateway.quotas.class_rates import ClassRates
from services.gateway.settings import GatewaySettings
from services.gateway.turns import Turns

_log = logging.getLogger(__name__)


class JobSubmission:
    """Starts jobs."""

    def __init__(
        self,
        effects: Effects,
        models: Models,
        reader: JobReader,
        open_jobs: OpenJobQuotas,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        encryption: Encryption | None = None,
        *,
        has_store: bool = False,
    ) -> None:
        """`has_store`: whether a large output may become a file."""
        self._effects = effects
        self._models = models
        self._reader = reader
        self._open_jobs = open_jobs
        self._settings = settings
        self._metrics = metrics
        self._turns = Turns(settings.tenants, classes=settings.classes)
        self._rates = ClassRates(settings.classes, metrics)
        self._encryption = encryption
        self._has_store = has_store

    async def submit(
        self, caller: Caller, request: llm_pb2.SubmitRequest, *, waiter: str = "", notify_operator: bool = True
    ) -> llm_pb2.SubmitResponse:
        """Start the job, or return the equal job that was started under its key. The job has passed all checks.

        `waiter` is as for job_start(). `notify_operator`: False if the operator's endpoint is not notified of the job,
        whatever GATEWAY_NOTIFY_OPERATOR says.

        Raises ApiError ALREADY_EXISTS for a key that belongs to another job, RESOURCE_EXHAUSTED beyond the rate of the
        job's class or the tenant's quota of open jobs or of output tokens, UNAVAILABLE when that is not known;
        RPCError when Temporal is unavailable; KeysUnavailable, AuditUnavailable.
        """
        job, traceparent = request.job, current_traceparent()
        job_class = class_of(job)
        now = Timestamp()
        now.GetCurrentTime()
        chosen = job_options(self._settings, self._models, job, has_store=self._has_store)
        chosen.ledger = self._open_jobs.ledger(caller.tenant)
        if not notify_operator:
            chosen.notify_operator = False
        hash_ = await self._hash_for(caller.tenant)
        start = job_start(
            job,
            chosen,
            tenant=caller.tenant,
            priority=self._turns.priority(caller.tenant, job.user_id, hash_, job_class),
            traceparent=traceparent,
            hash_=hash_,
            create_time=now,
            waiter=waiter,
        )
        for earlier in _earlier_ids(caller, job):
            if earlier != start.id:
                # The job may still run under the id of a version that did not shorten ids.
                with suppress(JobNotFound):
                    return await self._found(caller, earlier, job, None)
        if (too_often := self._rates.take(job_class)) is not None:
            # The rate is of new jobs.
            with suppress(JobNotFound):
                return await self._found(caller, start.id, job, None, once=True)
            raise too_often
        last_check = None
        if chosen.ledger:
            # The slot of a job that is not started is free again after a minute.
            audit.require_available()
            tokens = reserved_tokens(job, chosen.default_max_tokens)
            reservation = await self._open_jobs.reserve(caller.tenant, start.id, tokens)
            if isinstance(reservation, str):
                self._rates.put_back(job_class)
                # The quota is of new jobs.
                with suppress(JobNotFound):
                    return await self._found(caller, start.id, job, None, once=True)
                raise self._open_jobs.refusal(caller.tenant, reservation, tokens)
            last_check = reservation.require_valid
        try:
            handle = await self._effects.start(
                names.JOB_WORKFLOW_TYPE,
                job,
                id_=start.id,
                last_check=last_check,
                execution_timeout=start.execution_timeout,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=start.memo,
                search_attributes=start.search_attributes,
                priority=start.priority,
                request_eager_start=True,
            )
        except WorkflowAlreadyStartedError as error:
            self._rates.put_back(job_class)
            forget_frames(error)
            return await self._found(caller, start.id, job, error, has_slot=bool(chosen.ledger))
        # The name is one of the catalogue: any other was refused.
        self._metrics.submitted.add(1, {"gen_ai.request.model": job.model, "llm.job.class": label_of(job_class)})
        run_id = handle.first_execution_run_id or ""
        status = llm_pb2.JobStatus(
            workflow_id=start.id,
            run_id=run_id,
            state=llm_pb2.JOB_STATE_QUEUED,
            trace_id=trace_id(traceparent),
            create_time=now,
            job_class=job_class,
        )
        _log.info("job accepted", extra={"workflow_id": start.id, "run_id": run_id, "model": job.model})
        return llm_pb2.SubmitResponse(workflow_id=start.id, run_id=run_id, status=status)

    async def find_accepted(self, caller: Caller, request: llm_pb2.SubmitRequest) -> llm_pb2.SubmitResponse | None:
        """Return the job under the request's key if it equals the request's job; None if not.

        The method is for a request that breaks the rules or bounds: an older gateway, or one with other settings, may
        have accepted the job. Raises RPCError when Temporal is unavailable.
        """
        job = request.job
        if check_job(job, strict=False):
            # No version has ever accepted such a job, so Temporal need not be asked.
            return None
        ids = (workflow_id(job.user_id, job.request_id, caller.tenant), *_earlier_ids(caller, job))
        for id_ in dict.fromkeys(ids):
            with suppress(JobNotFound):
                description = await self._reader.describe(caller, id_, once=True)
                if await _is_of(description, job):
                    return await self._as_submitted(description)
        return None

    async def _found(
        self,
        caller: Caller,
        id_: str,
        job: llm_pb2.JobRequest,
        error: WorkflowAlreadyStartedError | None,
        *,
        once: bool = False,
        has_slot: bool = False,
    ) -> llm_pb2.SubmitResponse:
        """Return the job under an id. Raises ApiError ALREADY_EXISTS if it is another one.

        `once` is as for JobReader.describe. `has_slot`: a slot was reserved for the job, which it does not release any
        more if it has ended.
        """
        try:
            description = await self._reader.describe(caller, id_, once=once)
        except JobDeleted:
            if has_slot:
                await self._open_jobs.release(caller.tenant, id_)
            raise work_deleted("job", job.user_id, job.request_id) from error
        if not await _is_of(description, job):
            await link_call(description)
            if has_slot and description.status != WorkflowExecutionStatus.RUNNING:
                await self._open_jobs.release(caller.tenant, id_)
            raise key_reused(job.user_id, job.request_id) from error
        response = await self._as_submitted(description)
        if has_slot and response.status.state not in UNSETTLED_STATES:
            await self._open_jobs.release(caller.tenant, id_)
        return response

    async def _as_submitted(self, description: WorkflowExecutionDescription) -> llm_pb2.SubmitResponse:
        await link_call(description)
        status = (await self._reader.status_of(description)).status
        return llm_pb2.SubmitResponse(workflow_id=description.id, run_id=status.run_id, status=status)

    async def _hash_for(self, tenant: str) -> Hash | None:
        return None if self._encryption is None else await self._encryption.search_hash(tenant)


def _earlier_ids(caller: Caller, job: llm_pb2.JobRequest) -> tuple[str, ...]:
    """Return the id that the job may have from a version that did not shorten ids. Those knew no tenants."""
    return () if caller.tenant else (unshortened_workflow_id(job.user_id, job.request_id),)


async def _is_of(description: WorkflowExecutionDescription, job: llm_pb2.JobRequest) -> bool:
    """Return whether the workflow belongs to an equal job.

    A job of an older gateway has only the digest of its bytes. They are its normal form when the client set no default
    explicitly.
    """
    expected = digests(job)
    return bool({await description.memo_value(key, None) for key in expected} & {*expected.values()})
