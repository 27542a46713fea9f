"""The deletion of a job, LLMDeletionWorkflow, of many, LLMBulkDeletionWorkflow, and what is left in a job's place.

    stop the job (StopJob) ──▶ see what there is (InspectJob) ──▶ keep its id (KeepJobId) ──▶ remove it (RemoveJob)

What a deletion must not forget, the runs and where copies are, is in its own history before anything is removed. Each
step can be repeated, because a process may die after it and before Temporal has noted its end. The id of the job is
never free: the LLMJobTombstone is started under it while the closed job still has it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from datetime import timedelta
from typing import Final, TypeVar

from temporalio import workflow
from temporalio.common import RetryPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, ChildWorkflowError, WorkflowAlreadyStartedError

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.ids import deletion_workflow_id
    from jobs.inputs import one_input
    from jobs.search import about_user
    from llm_pb import internal_pb2, llm_pb2

from workflows import activities

_I = TypeVar("_I")
_O = TypeVar("_O")
_STEP_TIMEOUT: Final = timedelta(seconds=15)
"""Timeout of one try of a step. A step whose process was killed is tried again after it."""
_FIND_TIMEOUT: Final = timedelta(minutes=2)
_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
_FIRST_PAUSE: Final = timedelta(milliseconds=200)
_MAX_PAUSE: Final = timedelta(seconds=5)
_LATE_RECORDS: Final = timedelta(seconds=5)
"""Time for which an attempt of a terminated job may continue to write to the feed: it learns of the end by its next
heartbeat."""
_CONCURRENT: Final = 10
"""Maximum number of jobs that one LLMBulkDeletionWorkflow deletes concurrently."""
_MAX_UNREACHED: Final = 100
"""Maximum number of entries in Deletion.unreached."""
_MAX_FAILED: Final = 50
"""Number of failed deletions of jobs that end a bulk deletion. FindJobs returns more jobs, so it finds others, too."""
_LOOKS: Final = 4
"""Number of times that a bulk deletion looks for more jobs before it is done."""
_OPERATORS: Final = ("logs", "traces", "backups")
"""Places of the operator's that no deletion reaches."""


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
        self._deletion = _new_deletion()
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
            found = await _step(activities.inspect_job, job)
            remains.runs.extend(run for run in found.runs if run not in remains.runs)
            remains.cached = remains.cached or found.cached
            _add_unreached(deletion, found.unreached)
            # Somebody may have reset the job meanwhile, so that it runs again.
            kept = await _step(activities.keep_job_id, job)
        _add_unreached(deletion, [llm_pb2.UnreachedCopy(place=place) for place in _OPERATORS])
        if self._terminated:
            await workflow.sleep(_LATE_RECORDS)
        pause = _FIRST_PAUSE
        while not (removed := await _step(activities.remove_job, remains)).done:
            deletion.removed[:] = removed.removed
            await workflow.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)
        deletion.removed[:] = removed.removed
        deletion.deleted_jobs = 1
        return _ended(deletion)

    @workflow.query(name=names.QUERY_GET_DELETION)
    def get_deletion(self) -> llm_pb2.Deletion:
        """Return the deletion with its progress."""
        return self._deletion

    async def _stop(self) -> None:
        """Cancel the job and wait until it has closed; terminate it after the grace."""
        method, pause = internal_pb2.STOP_JOB_METHOD_CANCEL, _FIRST_PAUSE
        until = workflow.now() + self._request.grace.ToTimedelta()
        while True:
            request = internal_pb2.StopJobRequest(workflow_id=self._request.workflow_id, method=method)
            if (await _step(activities.stop_job, request)).closed:
                return
            await workflow.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)
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
        self._deletion = _new_deletion()
        if self._request.HasField("progress"):
            self._deletion.CopyFrom(self._request.progress)
        self._failed: set[str] = set()
        """The jobs whose deletion has failed in this run."""

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
            found = await _step(activities.find_jobs, find, _FIND_TIMEOUT)
            jobs = [id_ for id_ in found.workflow_ids if id_ not in self._failed]
            if jobs:
                before = self._deletion.deleted_jobs
                await self._delete(jobs)
                if len(self._failed) >= _MAX_FAILED:
                    raise self._failure(len(self._failed))
                quiet_since = workflow.now()
                if workflow.info().is_continue_as_new_suggested():
                    self._request.progress.CopyFrom(self._deletion)
                    workflow.continue_as_new(self._request)
                if self._deletion.deleted_jobs == before:
                    # All of them are being deleted by others.
                    await workflow.sleep(_MAX_PAUSE)
            elif workflow.now() >= quiet_since + settle:
                if found.workflow_ids:
                    raise self._failure(len(found.workflow_ids))
                break
            else:
                await workflow.sleep(settle / _LOOKS)
        _add_unreached(self._deletion, [llm_pb2.UnreachedCopy(place=place) for place in _OPERATORS])
        return _ended(self._deletion)

    @workflow.query(name=names.QUERY_GET_DELETION)
    def get_deletion(self) -> llm_pb2.Deletion:
        """Return the deletion with its progress."""
        return self._deletion

    def _failure(self, count: int) -> ApplicationError:
        return ApplicationError(f"the deletions of {count} jobs have failed; see the log of this workflow's worker")

    async def _delete(self, ids: Collection[str]) -> None:
        turns = asyncio.Semaphore(_CONCURRENT)

        async def delete(id_: str) -> None:
            async with turns:
                await self._delete_one(id_)

        await asyncio.gather(*map(delete, ids))

    async def _delete_one(self, id_: str) -> None:
        request = internal_pb2.DeletionRequest(workflow_id=id_, grace=self._request.grace)
        user_id = self._request.filters.user_id
        about = about_user(user_id, self._request.user_value or user_id)
        try:
            deletion: llm_pb2.Deletion = await workflow.execute_child_workflow(
                names.DELETION_WORKFLOW_TYPE,
                request,
                id=deletion_workflow_id(id_),
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                search_attributes=about.search_attributes,
                memo=about.memo,
                parent_close_policy=workflow.ParentClosePolicy.ABANDON,
                result_type=llm_pb2.Deletion,
            )
        except WorkflowAlreadyStartedError:
            # The job is found again if it is still there.
            workflow.logger.info("another deletion has the job %s", id_)
            return
        except ChildWorkflowError as error:
            workflow.logger.warning("the deletion of %s has failed: %s", id_, error.cause)
            if workflow.patched(names.PATCH_FAILED_DELETIONS):
                self._failed.add(id_)
            return
        self._deletion.deleted_jobs += 1
        _add_unreached(self._deletion, deletion.unreached)


async def _step(step: Callable[[_I], Awaitable[_O]], argument: _I, limit: timedelta = _STEP_TIMEOUT) -> _O:
    """Run a step until it succeeds, and return what it returns."""
    return await workflow.execute_activity(step, argument, start_to_close_timeout=limit, retry_policy=_RETRY)


def _new_deletion() -> llm_pb2.Deletion:
    info = workflow.info()
    deletion = llm_pb2.Deletion(deletion_id=info.workflow_id, state=llm_pb2.DELETION_STATE_IN_PROGRESS)
    deletion.create_time.FromDatetime(info.workflow_start_time)
    return deletion


def _ended(deletion: llm_pb2.Deletion) -> llm_pb2.Deletion:
    deletion.state = llm_pb2.DELETION_STATE_DONE
    deletion.end_time.FromDatetime(workflow.now())
    return deletion


def _add_unreached(deletion: llm_pb2.Deletion, copies: Iterable[llm_pb2.UnreachedCopy]) -> None:
    """Add copies to those that are known: one for each place and type, with the last time."""
    known = {(copy.place, copy.type): copy for copy in deletion.unreached}
    for copy in copies:
        same = known.get((copy.place, copy.type))
        if same is None:
            if len(deletion.unreached) < _MAX_UNREACHED:
                known[copy.place, copy.type] = deletion.unreached.add()
                known[copy.place, copy.type].CopyFrom(copy)
        elif copy.time.ToDatetime() > same.time.ToDatetime():
            same.time.CopyFrom(copy.time)
