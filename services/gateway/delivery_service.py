"""ListDeliveries and Redeliver: the log of the deliveries of a job, batch or pipeline, and sending them again.

What is said here of a job holds for a batch and a pipeline as well.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.field_rules import Violation
from jobs.ids import redelivery_workflow_id
from llm_pb import internal_pb2, llm_pb2
from runtime.auth import Caller
from runtime.tracebacks import forget_frames
from services.gateway.access import require_own
from services.gateway.batches.reader import BatchReader
from services.gateway.delivery_reader import DeliveryReader, Standing
from services.gateway.effects import Effects
from services.gateway.errors import (
    ApiError,
    BatchNotFound,
    JobNotFound,
    PipelineNotFound,
    exhausted,
    invalid,
    job_not_ended,
    not_found,
    temporal_unavailable,
)
from services.gateway.job_reader import JobReader
from services.gateway.job_traces import link_call
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.runs import Runs
from services.gateway.settings import GatewaySettings

_CLAIM_CLOSES: Final = timedelta(minutes=1)
"""Maximum time that an LLMRedeliveryWorkflow takes to close. It is short, because a job cannot be sent again before."""
_TRIES: Final = 5
"""Maximum number of times that the state of the deliveries is read. A workflow that ends meanwhile leaves a new one."""


class DeliveryService:
    """Implements the two methods of the API."""

    def __init__(
        self,
        client: Client,
        effects: Effects,
        jobs: JobReader,
        batches: BatchReader,
        pipelines: PipelineReader,
        reader: DeliveryReader,
        settings: GatewaySettings,
    ) -> None:
        self._effects = effects
        self._jobs = jobs
        self._batches = batches
        self._pipelines = pipelines
        self._reader = reader
        self._interval = settings.redeliver_interval
        self._runs = Runs(client)
        self._redelivering: set[str] = set()

    async def list_all(self, caller: Caller, request: llm_pb2.ListDeliveriesRequest) -> llm_pb2.ListDeliveriesResponse:
        """Return the log of deliveries. Raises ApiError NOT_FOUND, RPCError."""
        _, standing = await self._standing(caller, request.workflow_id)
        state = standing.state
        return llm_pb2.ListDeliveriesResponse(deliveries=[*state.deliveries, *state.earlier])

    async def redeliver(self, caller: Caller, request: llm_pb2.RedeliverRequest) -> llm_pb2.RedeliverResponse:
        """Send the chosen deliveries again, continuing from their present state.

        Raises ApiError NOT_FOUND, FAILED_PRECONDITION, INVALID_ARGUMENT for an id that is no delivery's,
        RESOURCE_EXHAUSTED too soon after the last Redeliver; RPCError.
        """
        require_own(caller, request.workflow_id)
        if caller.user_id:
            # Whose job it is decides before anything is said about it.
            await self._standing(caller, request.workflow_id)
        # Concurrent calls would all find that the last Redeliver was long ago.
        if request.workflow_id in self._redelivering:
            raise exhausted(f"another Redeliver of job {request.workflow_id} is under way")
        self._redelivering.add(request.workflow_id)
        try:
            return await self._redeliver(caller, request)
        finally:
            self._redelivering.remove(request.workflow_id)

    async def _redeliver(self, caller: Caller, request: llm_pb2.RedeliverRequest) -> llm_pb2.RedeliverResponse:
        job, standing = await self._standing(caller, request.workflow_id)
        if job is not None and job.status == WorkflowExecutionStatus.RUNNING:
            raise job_not_ended(request.workflow_id)
        _choose(standing.state.deliveries, request.delivery_ids)
        self._check_interval(request.workflow_id, standing.state)
        await self._claim(request.workflow_id)
        # Another gateway's Redeliver may have begun and ended since.
        chosen = await self._send_again(request, job)
        if job is not None:
            try:
                await self._describe(caller, request.workflow_id)
            except JobNotFound:
                # It was deleted after its deliveries were read, and what was just started holds its outcome.
                await self._runs.delete(standing.delivery_workflow_id, (names.DELIVERY_WORKFLOW_TYPE,))
                raise
        return llm_pb2.RedeliverResponse(deliveries=chosen)

    def _check_interval(self, workflow_id: str, state: internal_pb2.DeliveryState) -> None:
        """Refuse the call if the last one was accepted a moment ago. A storm of calls costs Temporal no more."""
        if not state.HasField("redeliver_time"):
            return
        wait = state.redeliver_time.ToDatetime(UTC) + self._interval - datetime.now(UTC)
        if wait > timedelta(0):
            raise self._too_soon(workflow_id, min(wait, self._interval))

    def _too_soon(self, workflow_id: str, wait: timedelta) -> ApiError:
        return exhausted(f"the deliveries of job {workflow_id} are sent again once in {self._interval} at most", wait)

    async def _claim(self, workflow_id: str) -> None:
        """Claim the job's deliveries: no other gateway sends them again until the interval is over.

        Temporal decides which one. Raises ApiError RESOURCE_EXHAUSTED if it is another one.
        """
        if not self._interval:
            return
        try:
            await self._effects.start(
                names.REDELIVERY_WORKFLOW_TYPE,
                id_=redelivery_workflow_id(workflow_id),
                start_delay=self._interval,
                # A worker of an earlier version does not know the type, and cannot end it.
                execution_timeout=self._interval + _CLAIM_CLOSES,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
            )
        except WorkflowAlreadyStartedError as error:
            forget_frames(error)
            raise self._too_soon(workflow_id, self._interval) from error

    async def _send_again(
        self, request: llm_pb2.RedeliverRequest, job: WorkflowExecutionDescription | None
    ) -> list[llm_pb2.Delivery]:
        """Signal the open workflow of the deliveries, or start one from the state that a closed one left."""
        for _ in range(_TRIES):
            state, id_, is_open = await self._reader.standing(request.workflow_id, job)
            chosen = _choose(state.deliveries, request.delivery_ids)
            if not is_open:
                await self._effects.start(
                    names.DELIVERY_WORKFLOW_TYPE,
                    state,
                    id_=id_,
                    id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                    id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                    start_signal=names.SIGNAL_REDELIVER,
                    start_signal_args=[request],
                )
                return chosen
            try:
                await self._effects.signal(id_, names.SIGNAL_REDELIVER, request)
            except RPCError as error:
                # It has ended since its state was read, so that state lacks its last attempts.
                if error.status != RPCStatusCode.NOT_FOUND:
                    raise
            else:
                return chosen
        raise temporal_unavailable(f"the deliveries of job {request.workflow_id} changed meanwhile; call again")

    async def _standing(self, caller: Caller, workflow_id: str) -> tuple[WorkflowExecutionDescription | None, Standing]:
        """Return the job, None when it is past its retention, and how its deliveries stand.

        Raises ApiError NOT_FOUND also for a job that the caller may not see.
        """
        require_own(caller, workflow_id)
        job = await self._job(caller, workflow_id)
        standing = await self._reader.standing(workflow_id, job)
        if job is None and not caller.may_see(standing.state.event.user_id):
            raise not_found(workflow_id)
        return job, standing

    async def _job(self, caller: Caller, workflow_id: str) -> WorkflowExecutionDescription | None:
        """Return the job, and link the call to its trace; None when it is past its retention or never existed."""
        try:
            description = await self._describe(caller, workflow_id)
        except JobNotFound:
            # Its deliveries may still be known.
            return None
        await link_call(description)
        return description

    async def _describe(self, caller: Caller, workflow_id: str) -> WorkflowExecutionDescription:
        """Return Temporal's description of a job, batch or pipeline. Raises JobNotFound, RPCError."""
        for reader in (self._jobs, self._batches, self._pipelines):
            with suppress(JobNotFound, BatchNotFound, PipelineNotFound):
                return await reader.describe(caller, workflow_id)
        raise not_found(workflow_id)


def _choose(deliveries: Sequence[llm_pb2.Delivery], ids: Sequence[str]) -> list[llm_pb2.Delivery]:
    known = {delivery.id for delivery in deliveries}
    violations = [
        Violation(f"delivery_ids[{index}]", "is no delivery of the job's outcome: see ListDeliveries")
        for index, id_ in enumerate(ids)
        if id_ not in known
    ]
    if not deliveries:
        violations = [Violation("workflow_id", "names a job that has no notify targets")]
    if violations:
        raise invalid(violations)
    return [delivery for delivery in deliveries if not ids or delivery.id in ids]
