"""The activities of LLMScheduledWorkflow: they start what a schedule starts, as its call does, and follow it."""

import dataclasses
import logging
from datetime import UTC
from typing import Final

from google.rpc import code_pb2, status_pb2
from temporalio import activity

from batches.rules import check_create
from jobs import names, pipeline_rules
from jobs.errors import reason_of
from jobs.field_rules import Violation
from jobs.ids import is_batch, is_pipeline
from jobs.rules import check_submit
from jobs.schedules import request_of
from llm_pb import batch_pb2, internal_pb2, llm_pb2, pipeline_pb2
from runtime.auth import Caller
from services.gateway.batches.reader import BatchReader
from services.gateway.batches.submission import BatchSubmission
from services.gateway.cancel import JobCancellation
from services.gateway.errors import ApiError, BatchNotFound, JobNotFound, PipelineNotFound, invalid
from services.gateway.job_bounds import JobBounds
from services.gateway.job_reader import JobReader
from services.gateway.job_record import FINAL_STATES
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.pipelines.submission import PipelineSubmission
from services.gateway.scopes import gateway_for
from services.gateway.submission import JobSubmission

_log = logging.getLogger(__name__)
_PASSES: Final = frozenset({"LIMIT_REACHED", "TEMPORAL_UNAVAILABLE", "KEYS_UNAVAILABLE"})
"""Reasons of errors that pass soon. The activity is tried again after one."""
_OF_BATCH: Final = {
    batch_pb2.BATCH_STATE_SUCCEEDED: llm_pb2.JOB_STATE_SUCCEEDED,
    batch_pb2.BATCH_STATE_FAILED: llm_pb2.JOB_STATE_FAILED,
    batch_pb2.BATCH_STATE_CANCELLED: llm_pb2.JOB_STATE_CANCELLED,
    batch_pb2.BATCH_STATE_EXPIRED: llm_pb2.JOB_STATE_TIMED_OUT,
}
"""The state of a run whose batch has ended so."""


class ScheduledJobs:
    """Starts and follows what schedules start: jobs, batches and pipelines."""

    def __init__(
        self,
        submission: JobSubmission,
        bounds: JobBounds,
        cancellation: JobCancellation,
        reader: JobReader,
        batches: tuple[BatchSubmission, BatchReader],
        pipelines: tuple[PipelineSubmission, PipelineReader],
    ) -> None:
        self._submission = submission
        self._bounds = bounds
        self._cancellation = cancellation
        self._reader = reader
        self._batches, self._batch_reader = batches
        self._pipelines, self._pipeline_reader = pipelines

    @activity.defn(name=names.ACTIVITY_START_SCHEDULED_JOB)
    async def start(self, request: internal_pb2.StartScheduledJobRequest) -> internal_pb2.ScheduledJob:
        """Start the job, batch or pipeline, or find it.

        The models, limits, quotas and defaults are those of this moment.
        """
        run = activity.info().workflow_id or ""
        started = request_of(request.schedule, request.nominal_time.ToDatetime(UTC))
        try:
            if isinstance(started, batch_pb2.CreateBatchRequest):
                # Its lines may do what the schedule's creator may.
                caller = dataclasses.replace(gateway_for(run), scopes=frozenset(request.scopes))
                return await self._start_batch(run, caller, started)
            if isinstance(started, pipeline_pb2.SubmitPipelineRequest):
                return await self._start_pipeline(run, started)
            response = await self._submit(run, started, canary=request.canary)
        except ApiError as error:
            if reason_of(error.status) in _PASSES:
                raise
            _log.warning("what %s starts was refused: %s", run, error)
            return internal_pb2.ScheduledJob(error=error.status, ended=True)
        return _of_job(response.status)

    @activity.defn(name=names.ACTIVITY_CHECK_SCHEDULED_JOB)
    async def check(self, request: internal_pb2.CheckScheduledJobRequest) -> internal_pb2.ScheduledJob:
        """Return how the job, batch or pipeline stands. Cancel it first if there is a reason."""
        id_, caller, reason = request.workflow_id, gateway_for(request.workflow_id), request.cancel_reason
        try:
            if is_batch(id_):
                if reason:
                    cancel_batch = batch_pb2.CancelBatchRequest(batch_id=id_, reason=reason)
                    return _of_batch(await self._batches.cancel(caller, cancel_batch))
                return _of_batch(await self._batch_reader.status(caller, id_))
            if is_pipeline(id_):
                if reason:
                    cancel_pipeline = pipeline_pb2.CancelPipelineRequest(pipeline_id=id_, reason=reason)
                    return _of_pipeline(await self._pipelines.cancel(caller, cancel_pipeline))
                return _of_pipeline((await self._pipeline_reader.read(caller, id_)).status)
            if reason:
                cancel = llm_pb2.CancelRequest(workflow_id=id_, reason=reason)
                return _of_job((await self._cancellation.cancel(caller, cancel)).status)
            return _of_job(await self._reader.readable_status(await self._reader.describe(caller, id_)))
        except (JobNotFound, BatchNotFound, PipelineNotFound):
            # It was deleted.
            return internal_pb2.ScheduledJob(workflow_id=id_, ended=True)

    async def _submit(self, run: str, request: llm_pb2.SubmitRequest, *, canary: bool) -> llm_pb2.SubmitResponse:
        """Do what the interceptor of the API does with a Submit. Raises ApiError, RPCError, KeysUnavailable."""
        caller = gateway_for(run)
        violations = [*check_submit(request), *await self._bounds.check(request, caller)]
        if violations:
            # An earlier try may have started it.
            if (accepted := await self._submission.find_accepted(caller, request)) is not None:
                return accepted
            raise invalid(violations)
        return await self._submission.submit(caller, request, waiter=run, notify_operator=not canary)

    async def _start_batch(
        self, run: str, caller: Caller, request: batch_pb2.CreateBatchRequest
    ) -> internal_pb2.ScheduledJob:
        violations: list[Violation] = [*check_create(request), *await self._batches.check(request)]
        if violations:
            if (accepted := await self._batches.find_accepted(caller, request)) is not None:
                return _of_batch(accepted)
            raise invalid(violations)
        return _of_batch(await self._batches.create(caller, request, waiter=run))

    async def _start_pipeline(self, run: str, request: pipeline_pb2.SubmitPipelineRequest) -> internal_pb2.ScheduledJob:
        caller = gateway_for(run)
        violations = [*pipeline_rules.check_submit(request), *await self._pipelines.check(request, caller)]
        if violations:
            if (accepted := await self._pipelines.find_accepted(caller, request)) is not None:
                return _of_pipeline(accepted)
            raise invalid(violations)
        return _of_pipeline(await self._pipelines.submit(caller, request, waiter=run))


def _of_job(status: llm_pb2.JobStatus) -> internal_pb2.ScheduledJob:
    state = status.state if status.state in FINAL_STATES else llm_pb2.JOB_STATE_UNSPECIFIED
    job = _standing(status.workflow_id, state, status.error)
    if job.ended and status.HasField("first_token_time"):
        first_token = status.first_token_time.ToDatetime(UTC) - status.create_time.ToDatetime(UTC)
        job.time_to_first_token.FromTimedelta(first_token)
    return job


def _of_batch(status: batch_pb2.BatchStatus) -> internal_pb2.ScheduledJob:
    return _standing(status.batch_id, _OF_BATCH.get(status.state, llm_pb2.JOB_STATE_UNSPECIFIED), status.error)


def _of_pipeline(status: pipeline_pb2.PipelineStatus) -> internal_pb2.ScheduledJob:
    state = status.state if status.state in FINAL_STATES else llm_pb2.JOB_STATE_UNSPECIFIED
    return _standing(status.pipeline_id, state, status.root.error)


def _standing(id_: str, state: "llm_pb2.JobState.ValueType", error: status_pb2.Status) -> internal_pb2.ScheduledJob:
    """Return how something stands. `state` is unspecified until it has ended."""
    standing = internal_pb2.ScheduledJob(workflow_id=id_, state=state, ended=bool(state))
    if state and error.code != code_pb2.OK:
        standing.error.CopyFrom(error)
    return standing
