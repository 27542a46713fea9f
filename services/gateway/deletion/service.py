"""DeleteJob, DeleteJobs, DeleteUser and GetDeletion: start deletions, which are workflows, and read how they stand."""

import logging
import uuid
from datetime import timedelta
from typing import Final, NamedTuple

from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus, WorkflowQueryFailedError
from temporalio.common import Priority, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption
from jobs import names, options
from jobs.ids import bulk_deletion_workflow_id, deletion_workflow_id, is_batch, is_pipeline, owner, tenant_of
from jobs.rules import filters_of
from jobs.search import Hash, about_user, user_value
from jobs.start import fair_owner, fair_turns
from llm_pb import internal_pb2, llm_pb2
from runtime import audit
from runtime.auth import Caller
from services.gateway.access import require_own
from services.gateway.deletion.open_deletions import OpenDeletions
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.effects import Effects
from services.gateway.errors import JobNotFound, deletion_not_found, not_found
from services.gateway.job_reader import JobReader
from services.gateway.job_record import user_of
from services.gateway.job_traces import link_call
from services.gateway.runs import Runs
from services.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)
_DELETIONS: Final = (
    names.DELETION_WORKFLOW_TYPE,
    names.BULK_DELETION_WORKFLOW_TYPE,
    names.USER_DELETION_WORKFLOW_TYPE,
)
_QUERY_TIMEOUT: Final = timedelta(seconds=3)
"""Maximum wait for the workflow's own answer. Without it the progress is less complete, not wrong."""


class _Known(NamedTuple):
    deletion: llm_pb2.Deletion
    user_id: str


class DeletionService:
    """Implements the methods of the API."""

    def __init__(
        self,
        client: Client,
        effects: Effects,
        jobs: JobReader,
        deliveries: DeliveryReader,
        settings: GatewaySettings,
        encryption: Encryption | None,
    ) -> None:
        self._client = client
        self._effects = effects
        self._open = OpenDeletions(client, settings)
        self._jobs = jobs
        self._deliveries = deliveries
        self._settings = settings
        self._runs = Runs(client)
        self._encryption = encryption

    async def delete_job(self, caller: Caller, request: llm_pb2.DeleteJobRequest) -> llm_pb2.DeleteJobResponse:
        """Start the deletion of a job, or return the one that was started. Raises ApiError NOT_FOUND, RPCError."""
        job = request.workflow_id
        require_own(caller, job)
        id_ = deletion_workflow_id(job)
        try:
            description = await self._jobs.describe(caller, job)
        except JobNotFound:
            known = await self._known(caller, id_)
            if known is not None and known.deletion.state != llm_pb2.DELETION_STATE_FAILED:
                return llm_pb2.DeleteJobResponse(deletion=known.deletion)
            if is_batch(job) or is_pipeline(job):
                # Their deliveries are found as those of a job.
                raise
            # The job is deleted in part, or it is past its retention and its deliveries are not.
            user_id = known.user_id if known is not None else await self._user_of_deliveries(caller, job)
        else:
            await link_call(description)
            user_id = await user_of(description)
        hash_ = await self._hash_for(caller.tenant)
        about = about_user(user_id, user_value(user_id, hash_))
        audit.describe(deletion=id_)
        await self._effects.start(
            names.DELETION_WORKFLOW_TYPE,
            internal_pb2.DeletionRequest(workflow_id=job, grace=options.duration(self._settings.delete_grace)),
            id_=id_,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            search_attributes=about.search_attributes,
            memo=about.memo,
            priority=_priority(caller.tenant, user_id, hash_),
        )
        _log.info("deletion accepted", extra={"workflow_id": job})
        return llm_pb2.DeleteJobResponse(deletion=await self._deletion(caller, id_))

    async def delete_jobs(self, caller: Caller, request: llm_pb2.DeleteJobsRequest) -> llm_pb2.DeleteJobsResponse:
        """Start the deletion of the jobs that match. Raises ApiError like OpenDeletions.reserve(), RPCError."""
        bulk = internal_pb2.BulkDeletionRequest(filters=filters_of(request), tenant=caller.tenant)
        deletion = await self._start(caller, request.user_id, names.BULK_DELETION_WORKFLOW_TYPE, bulk)
        return llm_pb2.DeleteJobsResponse(deletion=deletion)

    async def delete_user(self, caller: Caller, request: llm_pb2.DeleteUserRequest) -> llm_pb2.DeleteUserResponse:
        """Start the deletion of all that a user has. Raises like delete_jobs()."""
        all_of = internal_pb2.UserDeletionRequest(user_id=request.user_id, tenant=caller.tenant)
        deletion = await self._start(caller, request.user_id, names.USER_DELETION_WORKFLOW_TYPE, all_of)
        return llm_pb2.DeleteUserResponse(deletion=deletion)

    async def _start(
        self,
        caller: Caller,
        user_id: str,
        workflow_type: str,
        request: internal_pb2.BulkDeletionRequest | internal_pb2.UserDeletionRequest,
    ) -> llm_pb2.Deletion:
        """Start a deletion of many, whose request lacks what is the same for all of them."""
        id_ = bulk_deletion_workflow_id(caller.tenant, uuid.uuid4().hex)
        hash_ = await self._hash_for(caller.tenant)
        request.user_value = user_value(user_id, hash_)
        request.grace.CopyFrom(options.duration(self._settings.delete_grace))
        request.settle.CopyFrom(options.duration(self._settings.delete_settle))
        about = about_user(user_id, request.user_value)
        audit.describe(deletion=id_)
        audit.require_available()
        reservation = await self._open.reserve(caller.tenant, id_)
        await self._effects.start(
            workflow_type,
            request,
            id_=id_,
            last_check=reservation.require_valid,
            search_attributes=about.search_attributes,
            memo=about.memo,
            priority=_priority(caller.tenant, user_id, hash_),
        )
        _log.info("deletion of many jobs accepted", extra={"workflow_id": id_})
        return await self._deletion(caller, id_)

    async def get_deletion(self, caller: Caller, request: llm_pb2.GetDeletionRequest) -> llm_pb2.GetDeletionResponse:
        """Return how a deletion stands. Raises ApiError NOT_FOUND, RPCError."""
        return llm_pb2.GetDeletionResponse(deletion=await self._deletion(caller, request.deletion_id))

    async def _hash_for(self, tenant: str) -> Hash | None:
        return None if self._encryption is None else await self._encryption.search_hash(tenant)

    async def _deletion(self, caller: Caller, id_: str) -> llm_pb2.Deletion:
        known = await self._known(caller, id_)
        if known is None:
            raise deletion_not_found(id_)
        return known.deletion

    async def _user_of_deliveries(self, caller: Caller, job: str) -> str:
        """Return whose job it was by its deliveries. Raises ApiError NOT_FOUND also for the job of another user."""
        user_id = (await self._deliveries.standing(job, None)).state.event.user_id
        if not caller.may_see(user_id):
            raise not_found(job)
        return user_id

    async def _known(self, caller: Caller, id_: str) -> _Known | None:
        """Return a deletion that the caller may see, None when there is none."""
        if tenant_of(id_) != caller.tenant:
            return None
        description = await self._runs.describe(id_)
        if description is None or description.workflow_type not in _DELETIONS:
            return None
        user_id = await user_of(description)
        if not caller.may_see(user_id):
            return None
        return _Known(await self._read(description), user_id)

    async def _read(self, description: WorkflowExecutionDescription) -> llm_pb2.Deletion:
        deletion = llm_pb2.Deletion(deletion_id=description.id)
        deletion.create_time.FromDatetime(description.start_time)
        handle = self._client.get_workflow_handle(description.id, run_id=description.run_id)
        try:
            deletion = await handle.query(
                names.QUERY_GET_DELETION, result_type=llm_pb2.Deletion, rpc_timeout=_QUERY_TIMEOUT
            )
        except WorkflowQueryFailedError as error:
            _log.warning("%s does not report its progress: %s", description.id, error)
        except RPCError as error:
            # No worker runs workflows now, or the workflow has not begun.
            if error.status in (RPCStatusCode.UNAVAILABLE, RPCStatusCode.RESOURCE_EXHAUSTED):
                raise
            _log.info("%s does not report its progress yet: %s", description.id, error)
        if description.status == WorkflowExecutionStatus.RUNNING:
            deletion.state = llm_pb2.DELETION_STATE_IN_PROGRESS
            deletion.ClearField("end_time")
        elif description.close_time is not None:
            completed = description.status == WorkflowExecutionStatus.COMPLETED
            deletion.state = llm_pb2.DELETION_STATE_DONE if completed else llm_pb2.DELETION_STATE_FAILED
            deletion.end_time.FromDatetime(description.close_time)
        return deletion


def _priority(tenant: str, user_id: str, hash_: Hash | None) -> Priority:
    """Return the priority of a deletion, which its steps have, too: a tenant's deletions take turns as one user's."""
    return fair_turns(owner("", tenant) if tenant else fair_owner(user_id, tenant, hash_))
