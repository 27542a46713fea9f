"""What the workflows of deletions share: steps, progress, and the deletion of many jobs, each by a child workflow."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from datetime import timedelta
from typing import Final, TypeVar

from temporalio import workflow
from temporalio.common import RetryPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, ChildWorkflowError, WorkflowAlreadyStartedError

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.ids import deletion_workflow_id, is_batch
    from jobs.search import about_user
    from llm_pb import internal_pb2, llm_pb2

_I = TypeVar("_I")
_O = TypeVar("_O")
STEP_TIMEOUT: Final = timedelta(seconds=15)
"""Timeout of one try of a step. A step whose process was killed is tried again after it."""
FIND_TIMEOUT: Final = timedelta(minutes=2)
"""The same for a step that looks for jobs, schedules or files."""
FIRST_PAUSE: Final = timedelta(milliseconds=200)
MAX_PAUSE: Final = timedelta(seconds=5)
LOOKS: Final = 4
"""Number of times that a deletion of many looks for more jobs before it is done."""
_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
_CONCURRENT: Final = 10
"""Maximum number of jobs that one deletion of many deletes concurrently."""
_MAX_UNREACHED: Final = 100
"""Maximum number of entries in Deletion.unreached."""
MAX_FAILED: Final = 50
"""Number of failed deletions of jobs that end one of many. FindJobs returns more jobs, so it finds others, too."""
_OPERATORS: Final = ("logs", "traces", "backups")
"""Places of the operator's that no deletion reaches."""


async def step(activity: Callable[[_I], Awaitable[_O]], argument: _I, limit: timedelta = STEP_TIMEOUT) -> _O:
    """Run a step until it succeeds, and return what it returns."""
    return await workflow.execute_activity(activity, argument, start_to_close_timeout=limit, retry_policy=_RETRY)


def new_deletion() -> llm_pb2.Deletion:
    """Return the progress of a deletion that has just begun."""
    info = workflow.info()
    deletion = llm_pb2.Deletion(deletion_id=info.workflow_id, state=llm_pb2.DELETION_STATE_IN_PROGRESS)
    deletion.create_time.FromDatetime(info.workflow_start_time)
    return deletion


def ended(deletion: llm_pb2.Deletion) -> llm_pb2.Deletion:
    """Return the deletion, which is done."""
    deletion.state = llm_pb2.DELETION_STATE_DONE
    deletion.end_time.FromDatetime(workflow.now())
    return deletion


def add_operators(deletion: llm_pb2.Deletion) -> None:
    """Add the places of the operator's to the copies that the deletion does not reach."""
    add_unreached(deletion, [llm_pb2.UnreachedCopy(place=place) for place in _OPERATORS])


def add_unreached(deletion: llm_pb2.Deletion, copies: Iterable[llm_pb2.UnreachedCopy]) -> None:
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


def failure(count: int) -> ApplicationError:
    """Return the error of a deletion of many that could not delete all."""
    return ApplicationError(f"the deletions of {count} jobs have failed; see the log of this workflow's worker")


class ChildDeletions:
    """Deletes the jobs of a user, each by an LLMDeletionWorkflow. Pipelines and batches are jobs here.

    A job whose deletion fails is not tried again.
    """

    def __init__(
        self, deletion: llm_pb2.Deletion, request: internal_pb2.BulkDeletionRequest | internal_pb2.UserDeletionRequest
    ) -> None:
        """`deletion` is the progress of the whole, which is updated."""
        self._deletion = deletion
        self._request = request
        if isinstance(request, internal_pb2.UserDeletionRequest):
            self._user_id = request.user_id
        else:
            self._user_id = request.filters.user_id
        self.failed: set[str] = set()
        """The jobs whose deletion has failed in this run."""

    async def delete(self, ids: Collection[str], batches: Collection[str] = ()) -> bool:
        """Delete the jobs; return whether any was: others may be deleting all of them.

        `batches`: those among them that are batches, as far as their ids do not say so. Raises ApplicationError once
        too many deletions have failed.
        """
        turns, before = asyncio.Semaphore(_CONCURRENT), self._count()

        async def delete(id_: str) -> None:
            async with turns:
                await self._delete_one(id_, of_batch=is_batch(id_) or id_ in batches)

        await asyncio.gather(*map(delete, ids))
        if len(self.failed) >= MAX_FAILED:
            raise failure(len(self.failed))
        return self._count() != before

    def _count(self) -> int:
        return self._deletion.deleted_jobs + self._deletion.deleted_batches

    async def _delete_one(self, id_: str, *, of_batch: bool) -> None:
        request = internal_pb2.DeletionRequest(workflow_id=id_, grace=self._request.grace)
        about = about_user(self._user_id, self._request.user_value or self._user_id)
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
                self.failed.add(id_)
            return
        if of_batch:
            self._deletion.deleted_batches += 1
        else:
            self._deletion.deleted_jobs += 1
        add_unreached(self._deletion, deletion.unreached)
