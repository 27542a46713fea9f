"""The deletion of all that a user has, LLMUserDeletionWorkflow.

    schedules and their runs, pipelines, batches ──nothing of them for the settling time──▶ jobs, files ──▶ done

What starts others goes first: the batches and pipelines that schedules have started until the last of these was found,
and those that pipelines have started as steps until they had stopped; then the jobs and files that all of them have
made. Temporal's visibility shows everything late, so each part ends when nothing was found for the time that the
request says.
"""

from collections.abc import Awaitable, Callable
from typing import Final

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from google.protobuf.timestamp_pb2 import Timestamp

    from jobs import names
    from jobs.inputs import one_input
    from llm_pb import internal_pb2, llm_pb2

from workflows import activities
from workflows.child_deletions import (
    FIND_TIMEOUT,
    LOOKS,
    MAX_PAUSE,
    ChildDeletions,
    add_operators,
    ended,
    failure,
    new_deletion,
    step,
)

_MAX_GENERATIONS: Final = 8
"""Number of times that what pipelines have started meanwhile is looked for. What the user goes on to submit is found
with it, and must not keep the deletion from its end."""


@workflow.defn(name=names.USER_DELETION_WORKFLOW_TYPE)
class LLMUserDeletionWorkflow:
    """Deletes all that a user has. A job whose deletion fails is left, and the whole fails once the others are deleted.

    It is a type of its own, so that no gateway of an earlier version runs it, which would leave the half and say that
    it is done.
    """

    @workflow.init
    @one_input
    def __init__(self, request: internal_pb2.UserDeletionRequest | None = None) -> None:
        self._request = request if request is not None else internal_pb2.UserDeletionRequest()
        self._deletion = new_deletion()
        if self._request.HasField("progress"):
            self._deletion.CopyFrom(self._request.progress)
        if not self._request.HasField("scheduled_until"):
            self._request.scheduled_until.CopyFrom(self._deletion.create_time)
        self._children = ChildDeletions(self._deletion, self._request)
        # An earlier run may have deleted some.
        self._had_parents = self._request.HasField("progress")
        """Whether pipelines or batches were deleted since the last ones were looked for that these have started."""
        self._generations = 0

    @workflow.run
    @one_input
    async def run(self, request: internal_pb2.UserDeletionRequest | None = None) -> llm_pb2.Deletion:
        """Delete all and return the deletion. Raises ApplicationError when the deletion of a job has failed."""
        if not self._request.HasField("started_until"):
            await self._until_settled(self._delete_what_starts)
            self._request.started_until.FromDatetime(workflow.now())
        await self._until_settled(self._delete_the_rest)
        if self._children.failed:
            raise failure(len(self._children.failed))
        add_operators(self._deletion)
        return ended(self._deletion)

    @workflow.query(name=names.QUERY_GET_DELETION)
    def get_deletion(self) -> llm_pb2.Deletion:
        """Return the deletion with its progress."""
        return self._deletion

    async def _until_settled(self, delete: Callable[[], Awaitable[bool]]) -> None:
        """Repeat a deletion until it has found nothing for the settling time."""
        settle, quiet_since = self._request.settle.ToTimedelta(), workflow.now()
        while True:
            if await delete():
                quiet_since = workflow.now()
                if workflow.info().is_continue_as_new_suggested():
                    self._request.progress.CopyFrom(self._deletion)
                    workflow.continue_as_new(self._request)
            elif workflow.now() >= quiet_since + settle:
                return
            # Temporal and the store take a moment to remove what they were asked to.
            await workflow.sleep(min(settle / LOOKS, MAX_PAUSE))

    async def _delete_what_starts(self) -> bool:
        """Delete schedules, pipelines and batches; return whether any was found."""
        owned = await step(activities.delete_schedules, self._owned(), FIND_TIMEOUT)
        self._deletion.deleted_schedules += owned.deleted
        if owned.found:
            self._request.scheduled_until.FromDatetime(workflow.now())
        kinds = (names.PIPELINE_WORKFLOW_TYPE, names.BATCH_WORKFLOW_TYPE)
        if await self._delete_found(self._request.scheduled_until, *kinds):
            self._had_parents = True
            return True
        if self._had_parents and self._generations < _MAX_GENERATIONS:
            # They are gone now, and have started their last steps.
            self._had_parents, self._generations = False, self._generations + 1
            self._request.scheduled_until.FromDatetime(workflow.now())
            return True
        return owned.found

    async def _delete_the_rest(self) -> bool:
        """Delete jobs and files; return whether any was found."""
        until = self._request.started_until
        jobs = await self._delete_found(until, names.JOB_WORKFLOW_TYPE)
        owned = await step(activities.delete_files, self._owned(until), FIND_TIMEOUT)
        self._deletion.deleted_files += owned.deleted
        return jobs or owned.found

    async def _delete_found(self, before: Timestamp, *kinds: str) -> bool:
        """Delete the jobs of some types that started before a time; return whether any was found."""
        request = internal_pb2.FindJobsRequest(
            filters=llm_pb2.ListRequest(user_id=self._request.user_id),
            tenant=self._request.tenant,
            before=before,
            types=kinds,
        )
        found = await step(activities.find_jobs, request, FIND_TIMEOUT)
        jobs = [id_ for id_ in found.workflow_ids if id_ not in self._children.failed]
        if jobs:
            await self._children.delete(jobs, found.batches)
        return bool(jobs)

    def _owned(self, before: Timestamp | None = None) -> internal_pb2.DeleteOwnedRequest:
        return internal_pb2.DeleteOwnedRequest(
            user_id=self._request.user_id, tenant=self._request.tenant, before=before
        )
