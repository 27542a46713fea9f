"""SubmitPipeline and CancelPipeline."""

import logging
from datetime import timedelta
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2
from temporalio.client import WorkflowExecutionStatus
from temporalio.common import TypedSearchAttributes, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption
from jobs import names, options, work_start
from jobs.field_rules import Violation
from jobs.ids import delivery_workflow_ids, pipeline_workflow_id, trace_id
from jobs.pipeline_rules import check_complete, check_submit
from jobs.pipelines import FINAL_STATES, TASK_TIMEOUT, new_status, with_defaults
from jobs.search import Hash, attributes_of
from jobs.start import FAIRNESS_KEY
from llm_pb import common_pb2, internal_pb2, llm_pb2, pipeline_pb2
from runtime import audit
from runtime.auth import Caller
from runtime.grpc_auth import current_caller
from runtime.telemetry import current_traceparent
from runtime.tracebacks import forget_frames
from services.gateway.effects import Effects
from services.gateway.errors import ApiError, pipeline_key_reused, work_deleted
from services.gateway.job_options import delivery_options
from services.gateway.job_traces import link_call
from services.gateway.models.trained import TrainedModels
from services.gateway.pipelines.catalogue import check_registered, goes_on
from services.gateway.pipelines.datasets import Datasets
from services.gateway.pipelines.reader import PipelineReader, bare_status, reservation_of, used_tokens
from services.gateway.pipelines.spec_models import check_models
from services.gateway.quotas.admission import OpenJobQuotas
from services.gateway.settings import GatewaySettings
from services.gateway.turns import Turns

_log = logging.getLogger(__name__)
_DEFAULT_TIMEOUT: Final = timedelta(hours=24)
_GRACE: Final = timedelta(days=1)
"""Time that Temporal leaves a pipeline beyond its own and that of its compensations."""


class PipelineSubmission:
    """Starts and cancels pipelines."""

    def __init__(
        self,
        effects: Effects,
        reader: PipelineReader,
        open_jobs: OpenJobQuotas,
        settings: GatewaySettings,
        encryption: Encryption | None,
        datasets: Datasets,
        trained: TrainedModels,
    ) -> None:
        self._trained = trained
        self._datasets = datasets
        self._effects = effects
        self._reader = reader
        self._open_jobs = open_jobs
        self._settings = settings
        self._turns = Turns(settings.tenants, classes=settings.classes)
        self._encryption = encryption

    async def submit(
        self, caller: Caller, request: pipeline_pb2.SubmitPipelineRequest, *, waiter: str = ""
    ) -> pipeline_pb2.PipelineStatus:
        """Start a pipeline, or return the equal one that was started under its key. Its request has passed the rules.

        Raises ApiError ALREADY_EXISTS for a key that belongs to another pipeline, RESOURCE_EXHAUSTED beyond the quota
        of open jobs, FAILED_PRECONDITION for a training whose model has no room; RPCError, KeysUnavailable,
        AuditUnavailable. `waiter` is as in BatchSubmission.create().
        """
        pipeline, traceparent = request.pipeline, current_traceparent()
        id_ = pipeline_workflow_id(pipeline.user_id, pipeline.request_id, caller.tenant)
        audit.describe(user_id=pipeline.user_id, job=id_)
        found = await self._found(caller, id_, pipeline)
        # What a schedule starts has a key of its own, so one that is found was started by an earlier try.
        resumed = found is not None and not waiter and goes_on(found)
        if found is not None and not resumed:
            return found
        if pipeline.HasField("training"):
            # Otherwise the training fails after hours. Others may take the room meanwhile.
            await self._trained.require_room(caller.tenant, pipeline.training)
        hash_ = None if self._encryption is None else await self._encryption.search_hash(caller.tenant)
        chosen = self._options(caller, pipeline, hash_)
        chosen.resumed = resumed
        reuse = WorkflowIDReusePolicy
        if resumed and chosen.ledger:
            await self._release_failed(caller, id_)
        reservation = chosen.create_time.ToNanoseconds()
        # What a pipeline without a budget will use is not known. It leases what its steps need.
        last_check = await self._open_jobs.admit(caller.tenant, id_, pipeline.budget.output_tokens, reservation)
        job_class = pipeline.job_class or common_pb2.JOB_CLASS_STANDARD
        if resumed:
            await self._end_deliveries(id_)
        try:
            await self._effects.start(
                names.PIPELINE_WORKFLOW_TYPE,
                internal_pb2.PipelineRun(pipeline=pipeline, options=chosen),
                id_=id_,
                last_check=last_check,
                id_reuse_policy=reuse.ALLOW_DUPLICATE_FAILED_ONLY if resumed else reuse.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=work_start.memo(pipeline, chosen, chosen.create_time, traceparent, hash_, waiter),
                search_attributes=TypedSearchAttributes(
                    attributes_of(work_start.about(pipeline), caller.tenant, hash_)
                ),
                priority=self._turns.priority(caller.tenant, pipeline.user_id, hash_, job_class),
                # The last resort, for code that blocks or whose replay fails for ever.
                execution_timeout=_within(pipeline, self._settings) + self._settings.max_total_timeout + _GRACE,
                task_timeout=TASK_TIMEOUT,
                request_eager_start=True,
            )
        except WorkflowAlreadyStartedError as error:
            forget_frames(error)
            if (found := await self._found(caller, id_, pipeline)) is None:
                if not await self._reader.was_deleted(id_):
                    raise
                if chosen.ledger:
                    await self._open_jobs.release(caller.tenant, id_, reservation)
                raise work_deleted("pipeline", pipeline.user_id, pipeline.request_id) from None
            # A start whose answer was lost has found its own run.
            if chosen.ledger and await reservation_of(await self._reader.describe(caller, id_)) != reservation:
                await self._open_jobs.release(caller.tenant, id_, reservation)
            return found
        _log.info("pipeline accepted", extra={"workflow_id": id_})
        status = new_status(id_, pipeline, chosen)
        status.trace_id = trace_id(traceparent)
        return status

    async def cancel(self, caller: Caller, request: pipeline_pb2.CancelPipelineRequest) -> pipeline_pb2.PipelineStatus:
        """Cancel a pipeline and return its status. An ended one does not change. Raises ApiError, RPCError."""
        description = await self._reader.describe(caller, request.pipeline_id)
        await link_call(description)
        signalled = False
        if description.status == WorkflowExecutionStatus.RUNNING:
            signal = llm_pb2.CancelRequest(workflow_id=request.pipeline_id, reason=request.reason)
            try:
                await self._effects.signal(request.pipeline_id, names.SIGNAL_CANCEL, signal)
            except RPCError as error:
                # It may have ended meanwhile.
                if error.status != RPCStatusCode.NOT_FOUND:
                    raise
            else:
                signalled = True
        try:
            status = await self._reader.readable_status(caller, request.pipeline_id)
        except (ApiError, RPCError) as error:
            if not signalled or (isinstance(error, ApiError) and error.status.code != code_pb2.UNAVAILABLE):
                raise
            # The cancel is durable. Where many are cancelled at once, a pipeline answers later.
            _log.info("%s does not tell its status after a cancel: %r", request.pipeline_id, error)
            status = bare_status(description)
        if status.state not in FINAL_STATES:
            status.cancel_requested = True
        return status

    async def find_accepted(
        self, caller: Caller, request: pipeline_pb2.SubmitPipelineRequest
    ) -> pipeline_pb2.PipelineStatus | None:
        """Return the equal pipeline that was started before. Raises ApiError ALREADY_EXISTS for another one."""
        pipeline = request.pipeline
        id_ = pipeline_workflow_id(pipeline.user_id, pipeline.request_id, caller.tenant)
        return await self._found(caller, id_, pipeline)

    async def check(self, request: pipeline_pb2.SubmitPipelineRequest, caller: Caller | None = None) -> list[Violation]:
        """Return the violations of the operator's settings, and of what is registered here.

        `caller` is who submits the pipeline: by default who makes the call that is being handled.
        """
        pipeline, most = request.pipeline, self._settings.pipeline_max_timeout
        whole = with_defaults(pipeline, self._settings.pipeline_defaults.of(pipeline))
        caller = caller or current_caller()
        own = [model for model in self._settings.models if model.tenant in (None, caller.tenant)]
        violations = [*check_registered(pipeline), *check_complete(whole), *check_models(whole, own)]
        if pipeline.total_timeout.seconds + pipeline.total_timeout.nanos / 1e9 > most.total_seconds():
            violations.append(Violation("pipeline.total_timeout", f"must be at most {most}"))
        if violations or check_submit(request):
            # Temporal is not asked about a bad request.
            return violations
        return await self._datasets.check(caller, whole)

    async def _found(
        self, caller: Caller, id_: str, pipeline: pipeline_pb2.PipelineRequest
    ) -> pipeline_pb2.PipelineStatus | None:
        """Return the pipeline under an id; None without one. Raises ApiError ALREADY_EXISTS for another one."""
        try:
            description = await self._reader.describe(caller, id_)
        except ApiError:
            return None
        await link_call(description)
        if await description.memo_value(names.MEMO_DIGEST, None) != work_start.digest(pipeline):
            raise pipeline_key_reused(pipeline.user_id, pipeline.request_id)
        return (await self._reader.record_of(description)).status

    async def _release_failed(self, caller: Caller, id_: str) -> None:
        """Release the slot of the run that has failed, unless it has done so.

        What it has used counts before the next run reserves tokens. Raises ApiError, RPCError, KeysUnavailable.
        """
        description = await self._reader.describe(caller, id_)
        failed = await reservation_of(description)
        if failed and description.status != WorkflowExecutionStatus.RUNNING:
            used = await used_tokens(description)
            if used >= 0:
                await self._open_jobs.release(caller.tenant, id_, failed, used)

    async def _end_deliveries(self, id_: str) -> None:
        """End the deliveries of the outcome before: the workflow of those of the next one has the same id.

        Raises RPCError, AuditUnavailable.
        """
        for delivering in delivery_workflow_ids(id_):
            try:
                await self._effects.cancel(delivering, "the pipeline was submitted again")
            except RPCError as error:
                # There are none, or the id is longer than the server accepts.
                if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                    raise

    def _options(
        self, caller: Caller, pipeline: pipeline_pb2.PipelineRequest, hash_: Hash | None
    ) -> internal_pb2.PipelineOptions:
        now, settings = Timestamp(), self._settings
        now.GetCurrentTime()
        chosen = internal_pb2.PipelineOptions(
            create_time=now,
            ledger=self._open_jobs.ledger(caller.tenant),
            max_job_timeout=options.duration(settings.max_total_timeout),
            delivery=delivery_options(settings),
            defaults=settings.pipeline_defaults.of(pipeline),
            defaults_within=settings.pipeline_defaults.all(),
        )
        if not pipeline.budget.output_tokens and (a_day := self._open_jobs.tokens_a_day(caller.tenant)) is not None:
            chosen.leased_a_day = a_day
        within = _within(pipeline, settings)
        chosen.expire_time.FromNanoseconds(now.ToNanoseconds() + int(within / timedelta(microseconds=1)) * 1000)
        if hash_ is not None:
            for pair in attributes_of(work_start.about(pipeline)):
                chosen.hashes[pair.key.name] = hash_(pair.key.name, pair.value)
            chosen.hashes[FAIRNESS_KEY] = hash_(FAIRNESS_KEY, pipeline.user_id)
        return chosen


def _within(pipeline: pipeline_pb2.PipelineRequest, settings: GatewaySettings) -> timedelta:
    """Return the time after which a pipeline is stopped."""
    if pipeline.HasField("total_timeout"):
        return pipeline.total_timeout.ToTimedelta()
    return min(_DEFAULT_TIMEOUT, settings.pipeline_max_timeout)
