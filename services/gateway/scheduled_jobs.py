"""The activities of LLMScheduledWorkflow: they start the job of a schedule as Submit does, and follow it to its end."""

import logging
from datetime import UTC
from typing import Final

from google.rpc import code_pb2
from temporalio import activity

from jobs import names
from jobs.errors import reason_of
from jobs.rules import check_submit
from jobs.schedules import job_of
from llm_pb import internal_pb2, llm_pb2
from services.gateway.cancel import JobCancellation
from services.gateway.errors import ApiError, JobNotFound, invalid
from services.gateway.job_bounds import JobBounds
from services.gateway.job_reader import JobReader
from services.gateway.job_record import FINAL_STATES
from services.gateway.scopes import gateway_for
from services.gateway.submission import JobSubmission

_log = logging.getLogger(__name__)
_PASSES: Final = frozenset({"LIMIT_REACHED", "TEMPORAL_UNAVAILABLE", "KEYS_UNAVAILABLE"})
"""Reasons of errors that pass soon. The activity is tried again after one."""


class ScheduledJobs:
    """Starts and follows the jobs of schedules."""

    def __init__(
        self, submission: JobSubmission, bounds: JobBounds, cancellation: JobCancellation, reader: JobReader
    ) -> None:
        self._submission = submission
        self._bounds = bounds
        self._cancellation = cancellation
        self._reader = reader

    @activity.defn(name=names.ACTIVITY_START_SCHEDULED_JOB)
    async def start(self, request: internal_pb2.StartScheduledJobRequest) -> internal_pb2.ScheduledJob:
        """Start the job, or find it. The models, limits, quotas and defaults are those of this moment."""
        run = activity.info().workflow_id or ""
        job = job_of(request.schedule, request.nominal_time.ToDatetime(UTC))
        try:
            response = await self._submit(run, llm_pb2.SubmitRequest(job=job), canary=request.canary)
        except ApiError as error:
            if reason_of(error.status) in _PASSES:
                raise
            _log.warning("the job of %s was refused: %s", run, error)
            return internal_pb2.ScheduledJob(error=error.status, ended=True)
        return _standing(response.status)

    @activity.defn(name=names.ACTIVITY_CHECK_SCHEDULED_JOB)
    async def check(self, request: internal_pb2.CheckScheduledJobRequest) -> internal_pb2.ScheduledJob:
        """Return how the job stands. Cancel it first if there is a reason."""
        id_, caller = request.workflow_id, gateway_for(request.workflow_id)
        try:
            if request.cancel_reason:
                cancel = llm_pb2.CancelRequest(workflow_id=id_, reason=request.cancel_reason)
                return _standing((await self._cancellation.cancel(caller, cancel)).status)
            return _standing(await self._reader.readable_status(await self._reader.describe(caller, id_)))
        except JobNotFound:
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


def _standing(status: llm_pb2.JobStatus) -> internal_pb2.ScheduledJob:
    job = internal_pb2.ScheduledJob(workflow_id=status.workflow_id)
    if status.state not in FINAL_STATES:
        return job
    job.ended, job.state = True, status.state
    if status.error.code != code_pb2.OK:
        job.error.CopyFrom(status.error)
    if status.HasField("first_token_time"):
        first_token = status.first_token_time.ToDatetime(UTC) - status.create_time.ToDatetime(UTC)
        job.time_to_first_token.FromTimedelta(first_token)
    return job
