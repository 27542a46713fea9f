"""The deletion of a job, LLMDeletionWorkflow, of many, LLMBulkDeletionWorkflow, and what is left in a job's place.

    stop the job (StopJob) ──▶ see what there is (InspectJob) ──▶ keep its id (KeepJobId) ──▶ remove it (RemoveJob)

What a deletion must not forget, the runs and where copies are, is in its own history before anything is removed. Each
step can be repeated, because a process may die after it and before Temporal has noted its end. The id of the job is
never free: the LLMJobTombstone is started under it while the closed job still has it.
"""

from datetime import timedelta
from typing import Final

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.inputs import one_input
    from llm_pb import internal_pb2, llm_pb2

from workflows import activities
from workflows.child_deletions import (
    FIND_TIMEOUT,
    FIRST_PAUSE,
    LOOKS,
    MAX_PAUSE,
    ChildDeletions,
    add_operators,
    add_unreached,
    ended,
    failure,
    new_deletion,
    step,
)

_LATE_RECORDS: Final = timedelta(seconds=5)
"""Time for which an attempt of a terminated job may continue to write to the feed: it learns of the end by its next
heartbeat."""


@workflow.defn(name=names.TOMBSTONE_WORKFLOW_TYPE)
class LLMJobTombstone:
    """Has the id of a deleted job until the namespace's retention is over. Holds nothing."""

    @workflow.run
    async def run(self) -> None:
        """Close immediately."""


@workflow.defn(name=names.DELETION_WORKFLOW_TYPE)
class LLMDeletionWorkflow:
    """Deletes one job. Ends when nothing is left of it."""

    @workflow.init
    @one_input
    def __init__(self, request: internal_pb2.DeletionRequest | None = None) -> None:
        self._deletion = new_deletion()
        self._request = request if request is not None else internal_pb2.DeletionRequest()
        self._deletion.workflow_id = self._request.workflow_id
        self._terminated = False

    @workflow.run
    @one_input
    async def run(self, request: internal_pb2.DeletionRequest | None = None) -> llm_pb2.Deletion:
        """Delete the job and return the deletion."""
        job, deletion = self._request.workflow_id, self._deletion
        remains = internal_pb2.JobRemains(workflow_id=job)
        kept = False
        while not kept:
            await self._stop()
            found = await step(activities.inspect_job, job)
            remains.runs.extend(run for run in found.runs if run not in remains.runs)
            remains.cached = remains.cached or found.cached
            add_unreached(deletion, found.unreached)
            # Somebody may have reset the job meanwhile, so that it runs again.
            kept = await step(activities.keep_job_id, job)
        add_operators(deletion)
        if self._terminated:
            await workflow.sleep(_LATE_RECORDS)
        pause = FIRST_PAUSE
        while not (removed := await step(activities.remove_job, remains)).done:
            deletion.removed[:] = removed.removed
            await workflow.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)
        deletion.removed[:] = removed.removed
        deletion.deleted_jobs = 1
        return ended(deletion)

    @workflow.query(name=names.QUERY_GET_DELETION)
    def get_deletion(self) -> llm_pb2.Deletion:
        """Return the deletion with its progress."""
        return self._deletion

    async def _stop(self) -> None:
        """Cancel the job and wait until it has closed; terminate it after the grace."""
        method, pause = internal_pb2.STOP_JOB_METHOD_CANCEL, FIRST_PAUSE
        until = workflow.now() + self._request.grace.ToTimedelta()
        while True:
            request = internal_pb2.StopJobRequest(workflow_id=self._request.workflow_id, method=method)
            if (await step(activities.stop_job, request)).closed:
                return
            await workflow.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)
            method = internal_pb2.STOP_JOB_METHOD_UNSPECIFIED
            if workflow.now() >= until:
                method = internal_pb2.STOP_JOB_METHOD_TERMINATE
                self._terminated = True


@workflow.defn(name=names.BULK_DELETION_WORKFLOW_TYPE)
class LLMBulkDeletionWorkflow:
    """Deletes the jobs that match a filter and started before it, each by an LLMDeletionWorkflow.

    A job whose deletion fails is not tried again: the bulk deletion deletes the others and fails.

    Temporal's visibility shows a job, and its end, after a while. So it is asked again until it has shown none for the
    time that the request says.
    """

    @workflow.init
    @one_input
    def __init__(self, request: internal_pb2.BulkDeletionRequest | None = None) -> None:
        self._request = request if request is not None else internal_pb2.BulkDeletionRequest()
        self._deletion = new_deletion()
        if self._request.HasField("progress"):
            self._deletion.CopyFrom(self._request.progress)
        self._children = ChildDeletions(self._deletion, self._request)

    @workflow.run
    @one_input
    async def run(self, request: internal_pb2.BulkDeletionRequest | None = None) -> llm_pb2.Deletion:
        """Delete the jobs and return the deletion. Raises ApplicationError when the deletion of one has failed."""
        settle = self._request.settle.ToTimedelta()
        find = internal_pb2.FindJobsRequest(
            filters=self._request.filters, tenant=self._request.tenant, before=self._deletion.create_time
        )
        quiet_since = workflow.now()
        while True:
            found = await step(activities.find_jobs, find, FIND_TIMEOUT)
            jobs = [id_ for id_ in found.workflow_ids if id_ not in self._children.failed]
            if jobs:
                any_deleted = await self._children.delete(jobs)
                quiet_since = workflow.now()
                if workflow.info().is_continue_as_new_suggested():
                    self._request.progress.CopyFrom(self._deletion)
                    workflow.continue_as_new(self._request)
                if not any_deleted:
                    # All of them are being deleted by others.
                    await workflow.sleep(MAX_PAUSE)
            elif workflow.now() >= quiet_since + settle:
                if found.workflow_ids:
                    raise failure(len(found.workflow_ids))
                break
            else:
                await workflow.sleep(settle / LOOKS)
        add_operators(self._deletion)
        return ended(self._deletion)

    @workflow.query(name=names.QUERY_GET_DELETION)
    def get_deletion(self) -> llm_pb2.Deletion:
        """Return the deletion with its progress."""
        return self._deletion
