"""ListDeliveries and Redeliver: the log of a job's deliveries, and sending them again."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy

from jobs import names
from jobs.field_rules import Violation
from llm_pb import internal_pb2, llm_pb2
from runtime import audit
from runtime.auth import Caller
from runtime.temporal import RPC_TIMEOUT
from services.gateway.delivery_reader import DeliveryReader, Standing
from services.gateway.errors import JobNotFound, exhausted, invalid, job_not_ended, not_found
from services.gateway.job_parts import Runs
from services.gateway.job_reader import JobReader
from services.gateway.job_traces import link_call
from services.gateway.settings import GatewaySettings
from services.gateway.tenants import require_own


class DeliveryService:
    """Implements the two methods of the API."""

    def __init__(self, client: Client, jobs: JobReader, reader: DeliveryReader, settings: GatewaySettings) -> None:
        self._client = client
        self._jobs = jobs
        self._reader = reader
        self._workflow_queue = settings.workflow_queue
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
        state, delivery_workflow_id = standing
        chosen = _choose(state.deliveries, request.delivery_ids)
        self._check_interval(request.workflow_id, state)
        await audit.allow()
        await self._client.start_workflow(
            names.DELIVERY_WORKFLOW_TYPE,
            state,
            id=delivery_workflow_id,
            task_queue=self._workflow_queue,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            start_signal=names.SIGNAL_REDELIVER,
            start_signal_args=[request],
            rpc_timeout=RPC_TIMEOUT,
        )
        if job is not None:
            try:
                await self._jobs.describe(caller, request.workflow_id)
            except JobNotFound:
                # It was deleted after its deliveries were read, and what was just started holds its outcome.
                await self._runs.delete(delivery_workflow_id, names.DELIVERY_WORKFLOW_TYPE)
                raise
        return llm_pb2.RedeliverResponse(deliveries=chosen)

    def _check_interval(self, workflow_id: str, state: internal_pb2.DeliveryState) -> None:
        if not state.HasField("redeliver_time"):
            return
        wait = state.redeliver_time.ToDatetime(UTC) + self._interval - datetime.now(UTC)
        if wait > timedelta(0):
            message = f"the deliveries of job {workflow_id} are sent again once in {self._interval} at most"
            raise exhausted(message, min(wait, self._interval))

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
            description = await self._jobs.describe(caller, workflow_id)
        except JobNotFound:
            # Its deliveries may still be known.
            return None
        await link_call(description)
        return description


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
